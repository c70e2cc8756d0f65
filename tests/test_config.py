"""The config file: what is read, what is refused, and how the refusal is worded."""

import json
import string
import tomllib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from condor_lite import config as configuration
from condor_lite.config import Config, find, keys, load, table
from condor_lite.config_sections import LIVE_SOURCES, SECTIONS
from condor_lite.config_values import WrongValueError, read_duration, shown_duration
from condor_lite.errors import ConfigError
from condor_lite.game.entities import Setting
from condor_lite.game.schedule import bit_reversal_offset_s

ROOT = Path(__file__).parent.parent
SETTING = """
[[game.settings]]
assets = ["BTC", "ETH"]
horizon = "1h"
step = "1m"
interval = "12m"
"""


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Config]:
    """Load a config with one usable setting and this text besides."""

    def read_text(text: str = "", *, setting: str = SETTING, **environ: str) -> Config:
        file = tmp_path / "config.toml"
        file.write_text(text + setting, encoding="utf-8")
        return load(file, {f"CONDOR_LITE__{name}": value for name, value in environ.items()})

    return read_text


@pytest.fixture
def problems(read: Callable[..., Config], tmp_path: Path) -> Callable[..., list[str]]:
    """The problems of such a config, without the file's name in front of each."""

    def refuse(text: str = "", **rest: str) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            read(text, **rest)
        assert str(caught.value) == "\n".join(caught.value.problems)
        return [problem.removeprefix(f"{tmp_path / 'config.toml'}: ") for problem in caught.value.problems]

    return refuse


# What is read


def test_the_demo_is_the_documented_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load(None, {})
    assert config.game.assets == ("BTC", "ETH", "SOL", "XAU")
    assert {(s.horizon_s, s.step_s, s.interval_s) for s in config.game.settings} == {
        (60, 10, 20),
        (300, 30, 60),
    }
    assert (config.feed.source, config.feed.tick_s, config.feed.history_s) == (("synthetic",), 5, 86400)
    assert (config.scoring.interval_s, config.scoring.snapshot_interval_s) == (2, 30)
    assert config.orchestrator.mode == "local"
    assert config.orchestrator.models == tmp_path / "models"
    assert config.storage.path == tmp_path / "data" / "condor.db"


def test_the_config_beside_the_readme_is_the_demo_and_the_condor_game_in_comments() -> None:
    top = (ROOT / "config.toml").read_text(encoding="utf-8")
    demo = configuration.DEMO.read_text(encoding="utf-8")
    assert top.startswith(demo)
    assert tomllib.loads(top) == tomllib.loads(demo)
    lines = top.removeprefix(demo).strip().splitlines()
    assert all(line.startswith("#") for line in lines)
    condor = tomllib.loads("\n".join(line[2:] for line in lines[lines.index("# [game]") :]))
    asked = [(block["horizon"], block["interval"], block["step"]) for block in condor["game"]["settings"]]
    assert asked == [
        ("24h", "1h", ["5m", "1h", "6h", "24h"]),
        ("1h", "12m", ["1m", "5m", "15m", "30m", "60m"]),
    ]


def test_defaults_are_those_documented(read: Callable[..., Config], tmp_path: Path) -> None:
    config = read()
    for key in keys():
        if key.section == "game.settings" or " " in key.default:
            continue
        value = tomllib.loads(f"value = {key.default}")["value"]
        assert getattr(getattr(config, key.section), key.field) == key.kind.read(value, tmp_path), key.name
    assert config.feed.max_staleness_s == 3 * 60
    assert config.scoring.settle_delay_s == 60
    assert config.scoring.workers >= 1
    assert config.game.start_s is None


def test_defaults_that_depend_on_the_tick_follow_it(read: Callable[..., Config]) -> None:
    config = read('feed.tick = "5s"')
    assert (config.feed.max_staleness_s, config.scoring.settle_delay_s) == (15, 5)
    config = read('feed.tick = "5s"\nfeed.max_staleness = 7\nscoring.settle_delay = 0')
    assert (config.feed.max_staleness_s, config.scoring.settle_delay_s) == (7, 0)


def test_a_block_makes_a_setting_of_each_asset_and_step(read: Callable[..., Config]) -> None:
    config = read(setting=SETTING.replace('"1m"', '["1m", 300]') + "weight = 2\n")
    offset_s = bit_reversal_offset_s(1, 720, 60)
    assert offset_s == 360
    assert config.game.settings == (
        Setting("BTC", 3600, 60, 720, 0, 2.0),
        Setting("BTC", 3600, 300, 720, 0, 2.0),
        Setting("ETH", 3600, 60, 720, offset_s, 2.0),
        Setting("ETH", 3600, 300, 720, offset_s, 2.0),
    )
    assert config.game.assets == ("BTC", "ETH")


def test_paths_are_relative_to_the_file(read: Callable[..., Config], tmp_path: Path) -> None:
    config = read('storage.path = "../x/game.db"\norchestrator.models = "/srv/models"')
    assert config.storage.path == tmp_path.parent / "x" / "game.db"
    assert config.orchestrator.models == Path("/srv/models")


def test_a_source_may_have_others_to_fall_back_on(read: Callable[..., Config]) -> None:
    feed = read('feed.source = ["coinbase", "my.feeds:make"]').feed
    assert (feed.source, feed.simulated, feed.failover_after_s) == (("coinbase", "my.feeds:make"), False, 300)
    assert read(FEED__SOURCE="kraken").feed.source == ("kraken",)
    assert read(FEED__SOURCE='["kraken", "pyth"]').feed.source == ("kraken", "pyth")
    coarse = read('feed.tick = "5m"', setting=SETTING.replace('"1m"', '"5m"').replace('"12m"', '"10m"'))
    assert coarse.feed.failover_after_s == 1500


@pytest.mark.parametrize(
    "start", ['"2023-03-10T12:00:00Z"', '"2023-03-10T12:00"', "2023-03-10T13:00:00+01:00"]
)
def test_a_start_is_utc_unless_it_says_otherwise(
    start: str, read: Callable[..., Config], tmp_path: Path
) -> None:
    for asset in ("BTC", "ETH"):
        (tmp_path / f"{asset}.csv").write_text("timestamp,close\n")
    config = read(f'game.start = {start}\nfeed.source = "replay"\nfeed.path = "."')
    assert config.game.start_s == 1678449600
    assert config.feed.path == tmp_path


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_bytes(b"\xef\xbb\xbf" + SETTING.encode())
    assert load(file, {}).game.assets == ("BTC", "ETH")


def test_whatever_is_named_config_toml_is_found(tmp_path: Path) -> None:
    assert find(tmp_path) is None
    (tmp_path / "config.toml").symlink_to(tmp_path / "gone")
    assert find(tmp_path) == tmp_path / "config.toml"


@given(st.integers(1, 3650 * 86400))
@hypothesis_settings(max_examples=50)
def test_durations_survive_being_shown(seconds: int) -> None:
    assert read_duration(shown_duration(seconds)) == seconds == read_duration(seconds)


@example("5\u00a0s")
@given(st.text(max_size=8) | st.floats() | st.booleans() | st.none() | st.lists(st.integers(), max_size=2))
@hypothesis_settings(max_examples=100)
def test_whatever_is_no_duration_is_refused(value: object) -> None:
    try:
        assert read_duration(value) >= 1
    except WrongValueError:
        return
    assert isinstance(value, str)
    assert value.strip()[-1] in "smhd"
    assert all(character in string.digits or character.isspace() for character in value.strip()[:-1])


# Files that can't be read


@pytest.mark.parametrize(
    ("content", "right"),
    [
        (b"", "asks nothing: add a [[game.settings]] block"),
        (b"[game]\nname = 'x'\n", "asks nothing: add a [[game.settings]] block"),
        (b"[game]\nsettings = []\n", "asks nothing: add a [[game.settings]] block"),
        (b"[game.settings]\nassets = ['BTC']\n", "write [[game.settings]], in double brackets"),
        (b"[game]\nname = \n", "line 2, column 8"),
        (b"[game\n", "line 1"),
        (b"# a\n[game]\nname = 'a'\nname = 'b'", "line 4"),
        (b"# a\nname = '\xff'", "not UTF-8 (line 2)"),
        (b"x = " + b"[" * 10_000, "nested too deeply"),
        (b"x = " + b"9" * 10_000, "more than 4,000 digits"),
    ],
)
def test_an_unusable_file_says_why_and_where(content: bytes, right: str, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load(file, {})
    assert len(caught.value.problems) == 1
    assert str(caught.value).startswith(f"{file}: ")
    assert right in str(caught.value)


def test_a_missing_file_and_a_folder_say_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.toml: no such file; `condor-lite init DIR`"):
        load(tmp_path / "gone.toml", {})
    with pytest.raises(ConfigError, match="is a folder"):
        load(tmp_path, {})


# Values that can't be used

WRONG = [
    ("report.port = 99999", "report.port = 99999: must be an integer from 0 to 65535"),
    ("report.port = -1", "report.port = -1: must be an integer"),
    ('report.port = "8000"', 'report.port = "8000": must be an integer'),
    ("report.port = true", "report.port = true: must be an integer"),
    ("report.port = 8000.0", "report.port = 8000.0: must be an integer"),
    (
        'report.host = "0.0.0.0:80"',
        'report.host = "0.0.0.0:80": must be a host name or an address without a port',
    ),
    ('report.host = ""', "must be a host name"),
    ("report.cors_origins = ['*', 'example.org']", "must be a list of origins"),
    ("report.cors_origins = ['https://example.org/path']", "must be a list of origins"),
    ("report.cors_origins = '*'", "must be a list of origins"),
    ("predict.timeout = true", "predict.timeout = true: must be a duration"),
    ("predict.timeout = 1.5", "predict.timeout = 1.5: must be a duration: whole seconds such as 90"),
    ('predict.timeout = "1h30m"', 'predict.timeout = "1h30m": must be a duration'),
    ('predict.timeout = "50"', "must be a duration"),
    ("predict.timeout = 0", 'must be a duration from "1s" to'),
    ("predict.max_consecutive_failures = 0", "must be an integer from 1"),
    ('scoring.rule = "crsp"', 'must be "crps", "log", "likelihood" or "package.module:function"'),
    ('scoring.rule = "module:"', "package.module:function"),
    ('scoring.target = "price"', 'must be "log_return" or "price_change"'),
    ("scoring.workers = 0", "must be an integer from 1"),
    ("scoring.log_halfwidth = nan", "scoring.log_halfwidth = nan: must be a number above 0"),
    ("scoring.log_halfwidth = 0", "must be a number above 0"),
    ("game.speed = inf", "game.speed = inf: must be a number above 0"),
    ("game.speed = true", "game.speed = true: must be a number above 0"),
    ('game.crunch_id = "a/b"', 'game.crunch_id = "a/b": must be made of letters'),
    ('game.crunch_id = ".."', "must be made of letters"),
    ('game.name = "  "', "must be a string that is not empty"),
    ('game.name = "a\\nb"', "must not hold control characters"),
    ('game.base_class = "Tracker"', "must be a class with its module"),
    ("game.benchmarks = [1]", "must be a list of model ids as strings"),
    ('game.benchmarks = ["1", "1"]', 'must name each only once, "1" is there twice'),
    ('game.start = "soon"', "must be an ISO time such as"),
    ('game.start = "2023-03-10T12:00:00Z"', 'is for feed.source = "replay" only'),
    (
        'feed.source = "bitstamp"',
        'must be "synthetic", "replay", "coinbase", "kraken", "binance", "crunchdao"',
    ),
    ("feed.source = []", "must be one source, or a list of sources"),
    ('feed.source = ["coinbase", "bitstamp"]', 'must be "synthetic", "replay", "coinbase"'),
    ('feed.source = ["coinbase", "Krakn"]', "did you mean kraken?"),
    ('feed.source = ["kraken", "kraken"]', '"kraken" is there twice'),
    ('feed.source = ["coinbase", "synthetic"]', '"synthetic" stands alone'),
    ('feed.source = "coinbase"\ngame.speed = 2', "must be 1 unless feed.source is"),
    ("feed.failover_after = 119", 'must be at least 2 ticks of "60s"'),
    ('feed.source = "replay"', 'feed.path = "" (the default): must name the folder of <ASSET>.csv'),
    ('feed.source = "replay"\nfeed.path = "gone"', "must be a folder that can be read"),
    ('feed.source = "replay"\nfeed.path = "."', "has no BTC.csv, ETH.csv"),
    ('feed.history = "2m"', 'feed.history = "2m": must be at least 3 ticks of "60s"'),
    ("feed.max_staleness = 59", 'must be at least a tick, "60s"'),
    ('feed.base_url = "ftp://x"', "must be an http(s) address"),
    ("feed.symbols = {BTC = 1}", "must be a section of strings"),
    ("feed.symbols = {kraken = {BTC = 1}}", "must be a section of strings"),
    ('feed.symbols = {BTC = {BTC = "a"}}', "must be a section of strings"),
    ('feed.symbols = {BTCC = "x"}', "no setting asks for BTCC, only for BTC, ETH"),
    (
        'feed.source = "kraken"\nfeed.symbols = {kraken = {BTCC = "x"}}',
        "no setting asks for BTCC, only for BTC, ETH",
    ),
    ('feed.source = "kraken"\nfeed.symbols = {coinbase = {BTC = "x"}}', "coinbase is not in feed.source"),
    ('orchestrator.mode = "docker"', 'must be "local" or "remote"'),
    ('orchestrator.host = "0.0.0.0"', "must be a loopback address"),
    ("orchestrator.port = 8000", "report.port = 8000 (the default): must differ from orchestrator.port"),
    ('orchestrator.mode = "remote"\norchestrator.port = 0', "must be the port of the remote orchestrator"),
    ('orchestrator.mode = "remote"\norchestrator.credentials = "."', "has no ca.crt, tls.crt, tls.key"),
    (
        'orchestrator.mode = "remote"\norchestrator.credentials = "a"\norchestrator.gateway_key = "b"',
        "excludes",
    ),
    ('storage.path = ""', "must be a path"),
    ('storage.path = "."', "is a folder: must be a file"),
    ('storage.keep_prices = "8d"', 'must be at least feed.history, "30d"'),
    (
        'feed.history = "1h"\nstorage.keep_prices = "8d"',
        'must be at least storage.keep_payloads, the longest horizon and scoring.void_after together, "195h"',
    ),
    ('log.level = "INFO"', 'must be "debug", "info", "warning" or "error"'),
    ("log = 3", "log: must be a section: write [log] above its keys"),
    ("[[log]]", "log: must be a section"),
]


@pytest.mark.parametrize(("text", "right"), WRONG, ids=[text for text, _ in WRONG])
def test_a_wrong_value_is_refused_with_what_is_right(
    text: str, right: str, problems: Callable[..., list[str]]
) -> None:
    found = problems(text)
    assert len(found) == 1, found
    assert right in found[0]


WRONG_BLOCKS = [
    ('assets = "BTC"', "must be a list of asset names"),
    ("assets = []", "must be a list of asset names"),
    ('assets = ["BTC-USD"]', 'assets = ["BTC-USD"]: must be a list of asset names'),
    ('assets = ["../x"]', "must be a list of asset names"),
    ('assets = ["BTC", "BTC"]', "must name each only once"),
    ('horizon = "90s"', "must be a multiple of the step = "),
    ('step = "7s"', 'step = "7s": must be a multiple of feed.tick, "60s"'),
    ("step = []", "a list of durations"),
    ('step = ["1m", 60]', "must name each step only once"),
    ('interval = "90s"', 'interval = "90s": must be a multiple of feed.tick'),
    ("weight = 0", "must be a number above 0"),
    ('horizon = "3000d"', "segments, must make at most"),
    ('asset = ["BTC"]', "asset: unknown key; did you mean assets?"),
    ("x = 1", "x: unknown key; known are assets, horizon, step, interval, weight"),
]


@pytest.mark.parametrize("name", LIVE_SOURCES)
def test_a_tick_of_a_live_source_is_a_number_of_minutes(
    problems: Callable[..., list[str]], name: str
) -> None:
    found = problems(f'[feed]\nsource = "{name}"\napi_key = "key"\ntick = "90s"\n')
    assert f'feed.tick = "90s": {name} gives one price a minute: must be a multiple of "60s"' in found


def test_a_live_source_names_every_line_that_is_too_fine_for_it_at_once(
    problems: Callable[..., list[str]],
) -> None:
    block = SETTING.replace('"1h"', '"90s"').replace('"1m"', '["10s", "90s"]').replace('"12m"', '"20s"')
    found = problems('[feed]\nsource = "kraken"\ntick = "5s"\n', setting=block)
    ticks = 'must be a multiple of feed.tick, "60s", such as'
    assert sorted(problem.removeprefix("[[game.settings]] block 1: ") for problem in found) == [
        'feed.tick = "5s": kraken gives one price a minute: must be a multiple of "60s"',
        'horizon = "90s": must be a multiple of such steps, as "2m" is',
        f'interval = "20s": {ticks} "60s"',
        f'step = "10s": {ticks} "60s"',
        f'step = "90s": {ticks} "2m"',
    ]


@pytest.mark.parametrize(("line", "right"), WRONG_BLOCKS, ids=[line for line, _ in WRONG_BLOCKS])
def test_a_wrong_setting_is_refused_with_its_block(
    line: str, right: str, problems: Callable[..., list[str]]
) -> None:
    key = line.split(" =")[0]
    block = {"assets": '["SOL"]', "horizon": '"60m"', "step": '"60s"', "interval": '"60s"'}
    block[key] = line.split("= ", 1)[1]
    second = "[[game.settings]]\n" + "\n".join(f"{name} = {value}" for name, value in block.items())
    found = problems(setting=SETTING + second)
    assert any(right in problem for problem in found), found
    assert all(problem.startswith("[[game.settings]] block 2: ") for problem in found)


def test_what_a_block_lacks_is_named(problems: Callable[..., list[str]]) -> None:
    found = problems(setting="[[game.settings]]\nassets = ['BTC']\n")
    assert [problem.split(" is missing")[0] for problem in found] == [
        f"[[game.settings]] block 1: {key}" for key in ("horizon", "step", "interval")
    ]


def test_the_same_question_may_be_asked_only_once(problems: Callable[..., list[str]]) -> None:
    again = SETTING.replace('"ETH"', '"SOL"').replace('"1m"', '["5m", "1m"]').replace("12m", "6m")
    assert problems(setting=SETTING + again) == [
        "[[game.settings]] block 2: BTC over 60m in steps of 60s is already asked in block 1: once is enough"
    ]


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("report.prot = 1", "report.prot: unknown key; did you mean report.port?"),
        ("game.port = 1", "game.port: unknown key; did you mean orchestrator.port or report.port?"),
        ("log.zzz = 1", "log.zzz: unknown key; known are level, format in [log]"),
        ("port = 1", "port: a key outside of any section; did you mean orchestrator.port or report.port?"),
        ("zzz = 1", "zzz: a key outside of any section; write it below its [section]"),
        ("[gmae]", "[gmae]: unknown section; did you mean [game]?"),
        ("[zzz]", "[zzz]: unknown section; known are [game], [feed]"),
        ("'a\\nb' = 1", '"a\\\\nb": a key outside of any section'),
    ],
)
def test_an_unknown_key_names_the_nearest(text: str, right: str, problems: Callable[..., list[str]]) -> None:
    (found,) = problems(text)
    assert found.startswith(right)


def test_all_problems_come_at_once(problems: Callable[..., list[str]]) -> None:
    texts = [text for text, _ in WRONG if text.startswith(("report.port = 9", "scoring.rule", "log.level"))]
    found = problems(
        "\n".join([texts[0], texts[1], texts[-1], "feed.tik = 1"]), setting="", LOG__FORMAT="xml"
    )
    assert len(found) == 6
    assert sum("[[game.settings]]" in problem for problem in found) == 1


def test_a_wrong_tick_makes_no_further_problems(problems: Callable[..., list[str]]) -> None:
    (found,) = problems('feed.tick = "7x"\nfeed.history = 1')
    assert found.startswith('feed.tick = "7x"')


def test_long_values_are_shortened(problems: Callable[..., list[str]]) -> None:
    (found,) = problems(f"log.level = {json.dumps('x' * 5000)}")
    assert len(found) < 300
    (found,) = problems(f"report.port = {'9' * 4000}")
    assert "an enormous integer" in found


# The environment


def test_variables_override_the_file(read: Callable[..., Config], tmp_path: Path) -> None:
    config = read(
        'report.port = 1\nfeed.symbols = {BTC = "a", ETH = "b"}',
        REPORT__PORT="9000",
        REPORT__CORS_ORIGINS='["https://example.org"]',
        PREDICT__TIMEOUT="20s",
        SCORING__INTERVAL="3",
        SCORING__LOG_HALFWIDTH="2",
        FEED__API_KEY="0123",
        GAME__NAME='"quoted"',
        GAME__CRUNCH_ID="true",
        STORAGE__PATH="other/game.db",
        FEED__SYMBOLS__BTC="c-d",
    )
    assert config.report.port == 9000
    assert config.report.cors_origins == ("https://example.org",)
    assert (config.predict.timeout_s, config.scoring.interval_s, config.scoring.log_halfwidth) == (20, 3, 2)
    assert (config.feed.api_key, config.game.name, config.game.crunch_id) == ("0123", "quoted", "true")
    assert config.storage.path == tmp_path / "other" / "game.db"
    assert config.feed.symbols == {"BTC": "c-d", "ETH": "b"}


def test_a_table_may_be_overridden_whole(read: Callable[..., Config]) -> None:
    config = read('feed.symbols = {BTC = "a"}', FEED__SYMBOLS='{ETH = "b"}')
    assert config.feed.symbols == {"ETH": "b"}


def test_other_variables_do_not_matter(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(SETTING)
    assert load(file, {"CONDOR_LITE_PORT": "x", "PATH": "y"}) == load(file, {})


@pytest.mark.parametrize(
    ("variable", "value", "right"),
    [
        ("REPORT__PORT", "abc", 'CONDOR_LITE__REPORT__PORT: report.port = "abc": must be an integer'),
        ("REPORT__PORT", "", 'report.port = "": must be an integer'),
        ("REPORT__PORT", "1\n[x]", "must be an integer"),
        (
            "REPORT__PROT",
            "1",
            "CONDOR_LITE__REPORT__PROT: unknown key; did you mean CONDOR_LITE__REPORT__PORT?",
        ),
        ("REPORT", "1", "CONDOR_LITE__REPORT: unknown key; write CONDOR_LITE__SECTION__KEY"),
        ("", "1", "unknown key; write CONDOR_LITE__SECTION__KEY"),
        ("REPORT__PORT__X", "1", "unknown key"),
        ("FEED__SYMBOLS__", "1", "unknown key"),
        ("GAME__SETTINGS", "[]", "can't be set from the environment, only in the file"),
        ("GAME__SETTINGS__0__WEIGHT", "2", "can't be set from the environment, only in the file"),
        ("GAME__BENCHMARKS", "a,b", 'game.benchmarks = "a,b": must be a list of model ids'),
    ],
)
def test_a_wrong_variable_is_named(
    variable: str, value: str, right: str, problems: Callable[..., list[str]]
) -> None:
    (found,) = problems(**{variable: value})
    assert right in found


@pytest.mark.parametrize("text", ["feed.api_key = 1234567890", "feed.api_key = ['1234567890']"])
def test_secrets_are_never_shown(text: str, problems: Callable[..., list[str]]) -> None:
    (found,) = problems(text)
    assert "1234567890" not in found
    assert "hidden" in found


def test_a_pasted_key_is_not_shown(problems: Callable[..., list[str]]) -> None:
    key = "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBgkqhkiG9w0"
    for text in (key, key.splitlines()[1]):
        (found,) = problems('orchestrator.mode = "remote"', ORCHESTRATOR__GATEWAY_KEY=text)
        assert "MIIEvQIBADANB" not in found
        assert "hidden" in found


def test_an_api_key_is_not_in_the_configs_repr(read: Callable[..., Config]) -> None:
    assert "topsecret" not in repr(read(FEED__API_KEY="topsecret"))


# The documentation


def test_every_field_is_a_documented_key() -> None:
    documented = [(key.section, key.field) for key in keys() if key.section != "game.settings"]
    assert documented == [
        (section, entry.name)
        for section, record in SECTIONS.items()
        for entry in fields(record)
        if (section, entry.name) != ("game", "settings")
    ]
    assert all(key.meaning and key.default for key in keys())


def test_the_table_has_a_row_for_every_key() -> None:
    rows = table().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == [key.name for key in keys()]
    assert all(row.replace(r"\|", "").count("|") == 4 for row in rows)


def test_a_speed_at_which_ticks_run_together_is_refused(problems: Callable[..., list[str]]) -> None:
    found = problems("[game]\nspeed = 251\n[feed]\ntick = 5\n")
    assert len(found) == 1
    assert "game.speed" in found[0]
    assert "at most 250" in found[0]


def test_a_source_may_have_symbols_of_its_own(read: Callable[..., Config]) -> None:
    names = '{BTC = "a", ETH = "b", kraken = {ETH = "c"}}'
    feed = read(f'feed.source = ["coinbase", "kraken"]\nfeed.symbols = {names}').feed
    assert feed.symbols_at("coinbase") == {"BTC": "a", "ETH": "b"}
    assert feed.symbols_at("kraken") == {"BTC": "a", "ETH": "c"}
