"""The trained policy on a rank: passes over a batch, advantages, updates."""
