"""`nm-jax completion`."""

import click
from click.shell_completion import get_completion_class

from nm_jax.cli import _exits as exits


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(ctx, shell) -> int:
    """Print the script that completes nm-jax in a shell.

    \b
    bash: eval "$(nm-jax completion bash)"   in ~/.bashrc
    zsh:  eval "$(nm-jax completion zsh)"    in ~/.zshrc
    fish: nm-jax completion fish > ~/.config/fish/completions/nm-jax.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(ctx.find_root().command, {}, "nm-jax", "_NM_JAX_COMPLETE").source())
    return exits.DONE
