"""The one trainer: state, optimizer chain, the step that reads terms, checkpoints and the loop.
Methods differ by values, never by code here."""
