"""From prompts to a step's batch: samples, rewards, stored responses."""
