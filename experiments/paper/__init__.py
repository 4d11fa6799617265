"""The tables and figures of the paper, rendered from results: nothing is trained here."""
