# SPDX-License-Identifier: Apache-2.0
#
# /// script
# dependencies = ["trl-parm"]
# ///
"""Trains an autoregressive reward model from YAML, on one CPU or, with `accelerate launch`, on a cluster.

    python examples/train_arm.py --config examples/train_arm.yaml
    accelerate launch --config_file examples/accelerate_configs/fsdp2.yaml examples/train_arm.py --config my.yaml

Every key of the file is a flag too: those of `ARMArguments` (model, adapter, data) and of `PreferenceARMConfig`.
"""

from trl import TrlParser

from trl_parm import PreferenceARMConfig, PreferenceARMTrainer
from trl_parm.training.arguments import ARMArguments


def main(arguments: ARMArguments, config: PreferenceARMConfig) -> None:
    trainer = PreferenceARMTrainer(
        arguments.model_name_or_path,
        config,
        train_dataset=arguments.load(arguments.train_data),
        eval_dataset=arguments.load(arguments.eval_data),
        quantization_config=arguments.quantization_config(),
        peft_config=arguments.peft_config(config.label_columns),
    )
    trainer.train(resume_from_checkpoint=arguments.resume)
    if trainer.eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    trainer.save_state()
    trainer.save_model(config.output_dir)
    trainer.create_model_card()
    if config.push_to_hub:
        trainer.push_to_hub()
    # Without this a process may end while another still talks to it, and be counted as failed.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(*TrlParser((ARMArguments, PreferenceARMConfig)).parse_args_and_config())
