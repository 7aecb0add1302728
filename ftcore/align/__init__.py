"""Preference and RL: rewards, rollouts, advantages, objectives; PPO, GRPO, RLOO, DPO."""
