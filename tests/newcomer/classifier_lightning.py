"""The classifier of classifier.yaml with Lightning: python classifier_lightning.py [CHECKPOINT]."""

import sys

import lightning
import timm
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from torchvision.datasets import FakeData
from torchvision.transforms import ToTensor

EVAL_SETS = {"near": (90, 1000), "far": (70, 5000)}


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = timm.create_model("resnet10t", num_classes=10)
        self.metrics = torch.nn.ModuleDict()
        for name in EVAL_SETS:
            accuracy = MulticlassAccuracy(num_classes=10, average="micro")
            self.metrics[name] = torch.nn.ModuleDict({"accuracy": accuracy, "f1": MulticlassF1Score(num_classes=10)})

    def training_step(self, batch, index):
        inputs, targets = batch
        loss = torch.nn.functional.cross_entropy(self.model(inputs), targets)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, index, dataloader_idx=0):
        inputs, targets = batch
        outputs = self.model(inputs)
        name = list(EVAL_SETS)[dataloader_idx]
        loss = torch.nn.functional.cross_entropy(outputs, targets)
        self.log(f"eval/{name}/loss", loss, on_epoch=True, sync_dist=True, add_dataloader_idx=False)
        for key, metric in self.metrics[name].items():
            metric.update(outputs, targets)
            self.log(f"eval/{name}/{key}", metric, on_epoch=True, add_dataloader_idx=False)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-4, weight_decay=0.1)
        warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=10)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
        scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], [10])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def make_data(size, offset):
    return FakeData(size, (3, 32, 32), num_classes=10, transform=ToTensor(), random_offset=offset)


if __name__ == "__main__":
    lightning.seed_everything(0)
    train = DataLoader(make_data(512, 0), batch_size=32, shuffle=True)
    evals = [
        DataLoader(make_data(size, offset), batch_size=32)
        for size, offset in zip((90, 70), EVAL_SETS.values(), strict=True)
    ]
    trainer = lightning.Trainer(
        max_steps=60,
        val_check_interval=5,
        check_val_every_n_epoch=None,
        log_every_n_steps=5,
        gradient_clip_val=1.0,
        callbacks=[
            EarlyStopping("eval/near/f1", mode="max", patience=3),
            ModelCheckpoint(monitor="eval/near/f1", mode="max", save_top_k=1, save_last=True, every_n_train_steps=10),
        ],
        logger=[TensorBoardLogger("outputs"), CSVLogger("outputs"), WandbLogger(save_dir="outputs", offline=True)],
    )
    trainer.fit(Classifier(), train, evals, ckpt_path=sys.argv[1] if len(sys.argv) > 1 else None)
