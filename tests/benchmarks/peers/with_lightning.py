"""The same training as a LightningModule with Lightning's Trainer, logger and checkpoint callback."""

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader
from workload import CLIP_NORM, open_workload


class Module(LightningModule):
    def __init__(self, workload, model):
        super().__init__()
        self.workload, self.model = workload, model

    def training_step(self, batch, index):
        loss = self.model(**batch)["loss"]
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, index):
        self.log("eval/loss", self.model(**batch)["loss"], batch_size=len(next(iter(batch.values()))))

    def configure_optimizers(self):
        optimizer, scheduler = self.workload.make_optimizer(self.model)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def main():
    workload, folder, model, train, validation = open_workload()
    trainer = Trainer(
        max_steps=workload.steps,
        val_check_interval=workload.every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=workload.log_every,
        gradient_clip_val=CLIP_NORM,
        logger=TensorBoardLogger(folder),
        callbacks=[ModelCheckpoint(folder, every_n_train_steps=workload.every, save_top_k=-1)],
    )
    loader = DataLoader(train, workload.batch_size, shuffle=True, drop_last=True)
    trainer.fit(Module(workload, model), loader, DataLoader(validation, workload.batch_size))
    print(f"eval/loss {trainer.callback_metrics['eval/loss'].item()}")


if __name__ == "__main__":
    main()
