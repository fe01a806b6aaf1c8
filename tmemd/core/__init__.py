"""The page path: plain C over liblz4 behind a thin binding."""
