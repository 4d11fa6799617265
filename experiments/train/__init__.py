"""The one training loop: dense or sparse, in one process, resumable.

What is learned is a `Task`; how, an optax transformation, which is all that makes training sparse:

    tx = nm.sparse_training(optax.adam(1e-3), "2:4-T")  # was: tx = optax.adam(1e-3)
    state = fit(task, tx, steps=1000, folder=Path("runs/first"))

Batches are read by number and the random numbers of a step are derived from its number, so that a run is a function of
its seed, and its position in the data is the number of steps made. With a folder it is saved now and then; after
`kill -9` at any moment the same call goes on from the last checkpoint and ends bit for bit where it would have ended.
The folder has

    run.json           what the run is; another run is refused
    checkpoints/       orbax's: state, which has position and key; complete or not there at all
    metrics.jsonl      one line per logged step
    tensorboard/       the same, for `tensorboard --logdir`
    model.safetensors  at the end: what is evaluated, and nothing of the optimiser

`task` says what is learned, `recipe` with which schedule and optimiser, `state` what a run consists of, `folder` what
it leaves on disk, `mesh` how it is spread over devices, `loop` goes through the steps.
"""

from experiments.train.loop import Training as Training
from experiments.train.loop import fit as fit
from experiments.train.loop import make_step as make_step
from experiments.train.recipe import Recipe as Recipe
from experiments.train.state import State as State
from experiments.train.state import evaluated as evaluated
from experiments.train.state import start as start
from experiments.train.task import Task as Task
from experiments.train.task import classification as classification
