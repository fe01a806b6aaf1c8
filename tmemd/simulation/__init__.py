"""Recordings of what pools did, and their replay through policies."""
