"""Experiments: what the paper shows, on what fits on this machine, and benchmarks.

    python -m experiments                       # what there is: what it shows, of the paper, how long, which data
    python -m experiments NAME [--quick] [--report] [--out FOLDER]
    python -m experiments report --write        # the tables of the documentation, from the results

To add an experiment, write one file, here or in a folder; its path is its name (`bench/gram.py` is `bench/gram`), and
having an `EXPERIMENT` is what makes it one: there is no list to add it to. The docstring is what the list shows; of
the paper it may show `none`, and with other data than `none` the test that runs every experiment leaves it out.

    '''What is shown, in one line.

    The paper, its setting, its figures; what to expect.

    Paper: Table 2
    Time: 2 minutes on 2 cores
    Data: none
    '''

    from experiments.harness import Experiment, Run, Table

    def measure(run: Run) -> dict:
        steps = 3 if run.quick else 300  # --quick: all of it, tiny, in a few seconds
        return {"steps": steps, "loss": 0.5}  # what is written to results/<name>/<device>.json

    def tables(result: dict) -> list[Table]:
        return [Table("loss", ("steps", "loss"), [(result["steps"], f"{result['loss']:.2f}")])]

    EXPERIMENT = Experiment(measure, tables)

`Experiment` has more, where it is needed: a figure, a check whose failure is the exit status, options, parts. A file in
`paper/` measures nothing: it names the results that it renders. Whatever trains calls `experiments.train`; sparsity is
its optimiser. A trained result is a file in `configs/` that states a `Study`: what is trained alike, and how much of it
by the presets `cpu`, `gpu` and `paper`; the same command goes on where it was left. A table goes into the documentation
between `<!-- table: loss of NAME on cpu-x86-64 -->` and `<!-- end -->`.
"""
