"""The input pipeline on the host: records of any source become batches, in an order that is a
closed form of the stream position.

`sources` give random access to encoded images; `splits` opens the training and the held-out part;
`sampler` maps a stream position to a record; `decode` turns a record into RGB or refuses it;
`crops` cuts the two views of pre-training; `tokenizer` turns captions into ids; `batch_builder`
fills a batch, and `record_batches` is what it shares with the builders of dense tasks; `pipeline`
iterates over batches with Grain, whose workers `workers` restarts. Colours are changed on the
device, in `m3i_jax.augment`. This file imports nothing, so each module costs only what it
needs."""
