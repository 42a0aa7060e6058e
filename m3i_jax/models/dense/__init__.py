"""Dense tasks: reading maps at places, pyramids of maps, and the heads of segmentation and
detection. Heads read maps {stride in pixels: [B, H, W, C]}, whatever encoder made them."""
