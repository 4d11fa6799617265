"""The figures of merit of all pretrained networks, dense.

What the experiments on pretrained networks start from. Networks that were trained on cleaner pixels than those of the
data lose about ten points on it.

Paper: none
Time: 2 minutes on 2 cores
Data: pretrained weights, CIFAR, STS-B (NM_JAX_DATA)
"""

from experiments.harness import Experiment, Run, Table
from experiments.networks import NETWORKS

QUICK = 250  # test examples


def measure(run: Run) -> dict:
    """Evaluates a network on its test data."""
    network = NETWORKS[run.part]
    value = network.evaluate(network.variables(), QUICK if run.quick else None)
    return {"network": network.title, "metric": network.metric, "expected": network.expected, "value": value}


def tables(result: dict) -> list[Table]:
    """The figure, and what it was where the network comes from."""
    row = (result["network"], result["metric"], f"{result['expected']:.2f}", f"{result['value']:.2f}")
    return [Table("pretrained", ("network", "metric", "expected", "here"), [row])]


EXPERIMENT = Experiment(measure, tables, parts=tuple(NETWORKS))
