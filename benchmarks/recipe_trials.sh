#!/bin/sh
# Run one recipe of each kind on CIFAR-10 with a small network, from start to end through the command line.
#
#     benchmarks/recipe_trials.sh DATA OUTPUT
#
# DATA holds cifar10_train.tar and cifar10_test.tar, archives of class folders. The settings after the recipe scale it down: the
# network, the images, the length and the augmentation. Results: benchmarks/results/recipe_trials.md.
set -eu
data=$1
output=$2
mkdir -p "$output"

small="--data.root $data --data.train_split cifar10_train.tar --data.val_split cifar10_test.tar --data.input_size 32
    --loop.batch_size 128 --loop.micro_batch 128 --schedule.warmup_steps 120 --augment.auto_augment null --augment.crop_scale [0.5,1]"
scratch="--ema.warmup true --schedule.steps 1170 --optimizer.lr 2e-3 --augment.mixup 0 --augment.cutmix 0"
k7='{"kernel_sizes": [7, 7, 7, 7], "small_kernel": 0, "decomposed": false, "layer_scale": 1.0}'

# shellcheck disable=SC2086 # the settings are several words
{
    widekernel train --recipe replknet_31b_in1k_300e_224 --model.name replknet_nano --model.args '{}' \
        $small $scratch --output "$output/scratch"
    widekernel train --recipe replknet_31b_in1k_30e_384_from_in1k --model.name replknet_nano --model.args '{}' \
        --model.weights "$output/scratch/model.safetensors" $small --ema.warmup true --data.input_size 48 \
        --schedule.steps 390 --output "$output/finetune"
    widekernel train --recipe slak_tiny_in1k_300e_224 --model.name slak_nano --model.args '{"layer_scale": 1.0}' \
        $small $scratch --sparsity.dynamic.update_interval 100 --output "$output/sparse"
    widekernel train --recipe slak_pw_tiny_in1k_120e_224_coarse_pad_half_k --model.name slak_pw_nano \
        --model.args '{"layer_scale": 1.0, "padding": "same"}' $small $scratch \
        --sparsity.dynamic.update_interval 100 --output "$output/coarse"
    widekernel train --recipe resnet18_in1k_1e_224_2to4 --model.name replknet_nano --model.args '{}' \
        --model.weights "$output/scratch/model.safetensors" --sparsity.semi_structured.exclude '["head.fc"]' \
        $small --schedule.warmup_steps 0 --schedule.steps 600 --output "$output/learned"
    widekernel train --recipe slak_tiny_in1k_300e_224_k7_from_slak_tiny --model.name slak_nano --model.args "$k7" \
        --distillation.teacher.name null --distillation.teacher.weights "$output/sparse/model.safetensors" \
        $small $scratch --output "$output/distilled"
}
for run in scratch finetune sparse coarse learned distilled; do
    widekernel eval "$output/$run" --json
    widekernel eval "$output/$run" --json --processes 2
done
