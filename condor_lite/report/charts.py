"""How the web app shows the game: the leaderboard's columns and the charts of a model's page."""

from __future__ import annotations

from typing import Any, Literal

from condor_lite.report.answers import (
    Alert,
    Column,
    Filter,
    LineChart,
    ModelCell,
    ReportSchema,
    Series,
    Widget,
    XAxis,
    YAxis,
)

Kind = Literal["PROJECT", "USERNAME", "VALUE"]

_WINDOWS = (
    ("score_anchor", "Anchor", "7 days", "#1f6feb"),
    ("score_steady", "Steady", "3 days", "#2da44e"),
    ("score_recent", "Recent", "24 hours", "#d29922"),
)
_MEANING = "0 is the median model, higher is better; per cent of what “no move” would have scored"


def _column(order: int, kind: Kind, name: str, title: str, **more: Any) -> Column:
    return Column(
        id=order + 1,
        type=kind,
        property=name,
        format=more.get("format"),
        displayName=title,
        tooltip=more.get("tooltip"),
        nativeConfiguration=more.get("native"),
        order=order,
    )


def _chart(
    series: list[Series], group_by: str, filters: list[Filter] | None = None, alert: Alert | None = None
) -> LineChart:
    return LineChart(
        xAxis=XAxis("performed_at"),
        yAxis=YAxis(series, "decimal-1"),
        groupByProperty=group_by,
        alertConfig=alert,
        filterConfig=filters or [],
        displayEvolution=alert is None,
    )


_SERIES = [Series(name, label, color) for name, label, _, color in _WINDOWS]
_BY_SETTING = [Filter(label, label.lower(), autoSelectFirst=True) for label in ("Asset", "Horizon", "Step")]

REPORT_SCHEMA = ReportSchema(
    schema_version="1",
    leaderboard_columns=[
        _column(0, "PROJECT", "model_id", "Model", native=ModelCell("status")),
        _column(1, "USERNAME", "username", "Player"),
        *(
            _column(order, "VALUE", name, label, format="decimal-1", tooltip=f"Over {span}: {_MEANING}")
            for order, (name, label, span, _) in enumerate(_WINDOWS, start=2)
        ),
        _column(
            5,
            "VALUE",
            "skill_anchor",
            "Skill",
            format="percentage",
            tooltip="How much better than the benchmark over 7 days",
        ),
        _column(
            6,
            "VALUE",
            "answered",
            "Answers",
            format="integer",
            tooltip="Valid answers in the scored rounds of the last 7 days",
        ),
    ],
    metrics_widgets=[
        Widget(
            id=50,
            type="CHART",
            displayName="Score",
            tooltip=_MEANING,
            order=0,
            endpointUrl="/reports/models/global",
            nativeConfiguration=_chart(_SERIES, "model_id"),
        ),
        Widget(
            id=51,
            type="CHART",
            displayName="Score by setting",
            tooltip=_MEANING,
            order=1,
            endpointUrl="/reports/models/params",
            nativeConfiguration=_chart(_SERIES, "param", _BY_SETTING),
        ),
        Widget(
            id=52,
            type="CHART",
            displayName="Predictions",
            tooltip="The score of every single prediction; a mark where one failed",
            order=2,
            endpointUrl="/reports/predictions",
            nativeConfiguration=_chart(
                [Series("score_value", "Score", "#1f6feb")],
                "param",
                _BY_SETTING,
                Alert("score_failed", "score_failed_reason"),
            ),
        ),
    ],
)
