"""Two regimes, calm and turbulent: a mixture of two normals whose weights move with time.

How likely each regime is now comes from Bayes' rule over the last returns; further into the future the
weights go back to their long-run values, so the answer's segments differ.
"""

import numpy as np

from condor_lite.tracker import TrackerBase

DAYS = 2
REFIT_EVERY = 900  # seconds of price time
STAY = 7200.0  # seconds that a regime lasts, on average
TYPICAL = 1e-4  # volatility per square root of a second, before there are prices enough
SMALLEST_SCALE = 1e-6


class CalmTurbulent(TrackerBase):
    def __init__(self):
        self.regimes = {}  # (asset, step) -> (time of the fit, calm scale, turbulent scale, long-run weight)

    def predict(self, asset, horizon, step):
        calm, turbulent, usual = self.fit(asset, step)
        now = turbulence(np.array(self.prices.returns(asset, step, 0.25)), calm, turbulent, usual, step)
        answer = []
        for k in range(1, horizon // step + 1):
            weight = usual + (now - usual) * float(np.exp(-(k - 0.5) * step / STAY))
            answer.append({"step": k * step, "type": "mixture", "components": [
                {"density": normal(calm), "weight": 1 - weight},
                {"density": normal(turbulent), "weight": weight},
            ]})  # fmt: skip
        return answer

    def fit(self, asset, step):
        newest = self.prices.last(asset)
        time = newest[0] if newest else 0
        known = self.regimes.get((asset, step))
        if known is None or time - known[0] >= REFIT_EVERY:
            known = (time, *fit_regimes(np.array(self.prices.returns(asset, step, DAYS)), step))
            self.regimes[asset, step] = known
        return known[1:]


def normal(scale):
    return {"type": "builtin", "name": "norm", "params": {"loc": 0.0, "scale": scale}}


def fit_regimes(returns, step):
    """(calm scale, turbulent scale, share of turbulent time) of a two-component scale mixture, by EM."""
    if len(returns) < 20:
        scale = max(TYPICAL * float(np.sqrt(step)), SMALLEST_SCALE)
        return 0.7 * scale, 2.0 * scale, 0.2
    squares = np.maximum(returns**2, SMALLEST_SCALE**2)
    variances = np.array([np.quantile(squares, 0.5), np.quantile(squares, 0.95)]) + SMALLEST_SCALE**2
    share = 0.2
    for _ in range(30):
        weight = turbulent_odds(squares, *variances, share)
        share = float(np.clip(weight.mean(), 0.02, 0.5))
        variances[0] = np.average(squares, weights=1 - weight + 1e-9)
        variances[1] = np.average(squares, weights=weight + 1e-9)
    calm, turbulent = np.sqrt(variances)
    return max(float(calm), SMALLEST_SCALE), max(float(turbulent), 1.5 * float(calm), SMALLEST_SCALE), share


def turbulent_odds(squares, calm, turbulent, share):
    """The probability that each squared return came from the turbulent regime, for two variances."""
    in_calm = (1 - share) * np.exp(-squares / calm / 2) / np.sqrt(calm)
    in_turbulent = share * np.exp(-squares / turbulent / 2) / np.sqrt(turbulent)
    return (in_turbulent + 1e-300) / (in_calm + in_turbulent + 2e-300)


def turbulence(returns, calm, turbulent, usual, step):
    """How likely the market is turbulent after these returns, starting from the long-run share."""
    fade = float(np.exp(-step / STAY))
    odds_ratio = np.log(calm / turbulent) + returns**2 / 2 * (calm**-2 - turbulent**-2)
    weight = usual
    for ratio in np.exp(np.clip(odds_ratio[-60:], -30, 30)).tolist():
        weight = usual + (weight - usual) * fade
        weight = weight * ratio / (weight * ratio + 1 - weight)
    return min(max(weight, 0.001), 0.999)
