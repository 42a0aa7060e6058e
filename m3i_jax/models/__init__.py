"""Networks: vision transformer, decoder of dense targets, pooling, small heads, text tower, and all
of them as one parameter tree.

Every tower is an `init(settings, rng, ...) -> params` and an `apply(settings, params, ...)`.
Parameters are nested dicts of float32 arrays with readable names. Encoders have no other state, so
the momentum target is the same `apply` with another tree; running statistics of batch norms are in
the state of the optimizer. The precision of matrix products is
`model.dtype`; parameters are cast where they are used, norms and softmax stay in float32."""
