"""Where parameters enter a model through operators linear in them, and what follows from that.

The gradient of one example in a parameter that enters through a product is a sum of outer products,
`W[n] = Σ_t a[n, t] ⊗ g[n, t]`: activations that met the parameter, cotangents that came back. Norms, moments,
Gram matrices, Gauss-Newton diagonals and Kronecker factors are contractions of `(a, g)`; no gradient of an
example is ever made. `taps` finds these operators, `tapped` runs the model and keeps `(a, g)`, `forms` are
the few shapes that they have, and each quantity is a contraction of a form.
"""
