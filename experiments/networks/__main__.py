"""The figures of merit of all pretrained networks, dense: `python -m experiments.networks`, about two minutes."""

from rich.console import Console
from rich.table import Table

from experiments.networks import NETWORKS


def main() -> None:
    """Evaluates every network on its test data."""
    table = Table("network", "metric", "expected", "here", box=None)
    for network in NETWORKS.values():
        value = network.evaluate(network.variables())
        table.add_row(network.title, network.metric, f"{network.expected:.2f}", f"{value:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
