"""The command line: `dfrot-lab --help`. Heavy imports wait until a command needs them.

Completion: add `eval "$(_DFROT_LAB_COMPLETE=bash_source dfrot-lab)"` to ~/.bashrc (zsh_source, fish_source
likewise).
"""

from __future__ import annotations

import errno

import click

from dfrot_lab import __version__, profiles
from dfrot_lab.cli.exports import export, import_rotation
from dfrot_lab.cli.quantized import evaluate, generate, quantize
from dfrot_lab.cli.results import gallery, publish, redraw, verify
from dfrot_lab.cli.rotations import collect, merge, optimize
from dfrot_lab.cli.runs import assets, batch, lock, plan, run

__all__ = ["app"]


class _Group(click.Group):
    """Our own errors are one line for the user; anything else is a bug and keeps its traceback.

    Exit status: 2 for what is wrong in the command or its profile, as click has it; 1 for all else.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of use, as they were added; click sorts by name."""
        return list(self.commands)

    def invoke(self, ctx: click.Context):
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit):
            raise
        except profiles.ProfileError as error:
            raise click.UsageError(str(error)) from error
        except BrokenPipeError:  # nobody reads on: click ends quietly
            raise
        except OSError as error:
            raise click.ClickException(_os_error(error)) from error
        except Exception as error:
            if (
                type(error).__module__.split(".")[0] != "dfrot_lab"
                and type(error) is not ValueError
            ):
                raise
            raise click.ClickException(str(error)) from error


def _os_error(error: OSError) -> str:
    said = str(error.strerror or error)
    said += f": {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        from dfrot_lab.notebooks import FREE_SPACE

        said += FREE_SPACE
    return said


@click.group(
    cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "show_default": True}
)
@click.version_option(__version__, prog_name="dfrot-lab")
def app() -> None:
    """Reproduce DFRot: figures, rotations and tables, from models × seeds × bits."""


for _command in (
    *(assets, run, batch, plan),
    *(redraw, verify, publish, gallery),
    *(collect, optimize, merge, quantize, evaluate, generate),
    *(export, import_rotation),
    lock,
):
    app.add_command(_command)
