"""The objective: its terms as pure functions, in one pass with gradients, and where it joins in."""
