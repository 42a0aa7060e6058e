"""The host side of data: records of any source become masked view pairs, in an order that is a
closed form of the position.

`sources` (folder, tars, shapes) give random access to encoded images; `records` turns one of them
into RGB or says why it cannot; `order` maps a position of the stream to a record; `crops` cuts the
two views; `tokenizer` turns captions into ids; `pipeline` puts the batch together; `photometric`
colours it on the device. Nothing is imported here, so that each file costs only what it needs."""
