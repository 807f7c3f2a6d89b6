"""Overrides that make `experiment=audio_codes` a run of four steps on audio files in `speech/`."""

SMALL_AUDIO_CODES = [
    "experiment=audio_codes", "data.train.path=speech", "data.train.cache=false", "data.train.shortest_s=0.3",
    "data.train.longest_s=0.8", "data.train.codec.num_codebooks=3", "data.train.codec.card=8", "model.width=16",
    "model.depth=2", "model.heads=2", "sampler.max_cost=120", "trainer.steps=4", "trainer.save_every=2",
    "trainer.eval_every=4", "trainer.log_every=1", "report.prompt_s=0.1", "report.continued_s=0.2",
    "data.train.validation_fraction=0.4", "distributed.device=cpu",
]  # fmt: skip
