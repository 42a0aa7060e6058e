"""Networks: vision transformer, decoder of dense targets, pooling, small heads, text tower, and all
of them as one parameter tree.

Every tower is an `init(settings, rng, ...) -> params` and an `apply(settings, params, ...)`.
Parameters are nested dicts of float32 arrays with readable names; there is no other model state, so
the momentum target is the same `apply` with another tree. The precision of matrix products is
`model.dtype`; parameters are cast where they are used, norms and softmax stay in float32."""
