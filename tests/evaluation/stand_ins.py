"""What stands for a posterior where only its draws matter."""


class Atoms:
    """A posterior of some atoms (S, C), the same for every row; notes what it is asked for."""

    has_mean = False

    def __init__(self, model, values):
        self.model = model
        self.values = values
        self.atoms = len(values)
        self.asked = []

    def logits(self, inputs, draws):
        self.asked.append(draws)
        values = self.values[list(draws.indices)]
        return values[:, None].expand(-1, len(inputs["input_ids"]), -1)
