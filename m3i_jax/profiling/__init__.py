"""Cost of a compiled or traced program: FLOPs, memory, traffic, collectives; hardware; traces."""
