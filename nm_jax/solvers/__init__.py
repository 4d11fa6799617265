"""Solvers: tiles of scores in, masks out. One algorithm, one file."""

from nm_jax.solvers._proof import Proof as Proof
from nm_jax.solvers._slabs import Solved as Solved
from nm_jax.solvers._slabs import solve_matrices as solve_matrices
from nm_jax.solvers.base import Solution as Solution
from nm_jax.solvers.base import Solver as Solver
from nm_jax.solvers.enumeration import Enumeration as Enumeration
from nm_jax.solvers.exact import Exact as Exact
from nm_jax.solvers.flow import MinCostFlow as MinCostFlow
from nm_jax.solvers.greedy import Greedy as Greedy
from nm_jax.solvers.integer import IntegerProgram as IntegerProgram
from nm_jax.solvers.meet_in_the_middle import MeetInTheMiddle as MeetInTheMiddle
from nm_jax.solvers.menu import MENU as MENU
from nm_jax.solvers.menu import default_solver as default_solver
from nm_jax.solvers.menu import solve as solve
from nm_jax.solvers.topk import TopK as TopK
from nm_jax.solvers.topk import Window as Window
