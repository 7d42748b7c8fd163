"""The training side: which training points has a model memorized, and is it overfitting or the data?

Four measures, one file each: `memorization` (van den Burg & Williams 2021), `density` (Feiszli 2017), `dimension` (Ross et al. 2024) and
`neighbours`, the test that all three argue against. `subjects` says what each of them needs of a model. Nothing in the guard imports this.
"""
