"""What the terminal shows."""

from ssl_vit.commands.cli import show_table


def test_names_in_a_table_are_shown_as_they_are(capsys):
    """Not as the pictures and colours that they name in the terminal library."""
    show_table("mix of digits:train: and a[red]b", [("digits:train: 3", "scans[bold]1[/bold].tif")])
    shown = capsys.readouterr().out
    for text in ("digits:train: and a[red]b", "digits:train: 3", "scans[bold]1[/bold].tif"):
        assert text in shown
