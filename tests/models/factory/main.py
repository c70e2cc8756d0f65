"""No class of the game's at all: `create_model` says what to call."""


class Anything:
    def predict(self, asset, horizon, step):
        return f"{asset} {horizon} {step}"


def create_model():
    return Anything()
