"""The mixture: options, a decoder's parts, late norms and router, and the module around them."""
