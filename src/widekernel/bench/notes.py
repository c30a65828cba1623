"""The notes below each table, which explain how to read it."""

from __future__ import annotations

_INPUT_GRADIENT = (
    "Our input gradient includes flipping the kernel. PyTorch's gradients are computed by `aten.convolution_backward`, one "
    "at a time."
)
_ORDER = (
    "in rounds, in an order that changes from round to round. Each follows every other one equally often only if all take "
    "part in as many rounds as there are calls to compare (twice as many if their number is odd), or in a multiple of them."
)
_MEMORY = (
    "While they run, the process keeps freed memory where the allocator allows it, so that no call pays for pages that an "
    "earlier one returned to the system."
)
_IN_TURN = f"{_ORDER} Calls below 20 ms are timed in bursts, each of which begins with an untimed call. {_MEMORY}"
OPERATOR_NOTES: tuple[str, ...] = (
    "Times are medians of calls made in turn with the other implementations, on the same numbers, in float32; ± is "
    "half the interquartile range. A number in parentheses is the number of calls, if there were fewer than five: an "
    "implementation that takes more than a second is called once.",
    f"Calls are made {_IN_TURN} Beside onnxruntime and OpenVINO, 20 ms pass before each turn, so that the threads of the "
    "others sleep, and then 5 ms of untimed calls wake the processor.",
    "× best, × NCHW: speed-up of ours over PyTorch in its faster layout, and in its default layout.",
    "GFLOP/s count two operations for each tap that lies on a pixel, and none for padding. An algorithm that needs "
    "fewer operations can exceed the FMA peak (of peak > 1).",
    "limit: the time of direct computation at the FMA peak, or of reading and writing everything once at the speed with "
    "which PyTorch copies tensors of this size, whichever is longer.",
    _INPUT_GRADIENT,
    "Before anything is timed, the operator is compared with its definition in float64 on small shapes; before each "
    "case, all implementations are compared with each other.",
)
BRANCHES_NOTES: tuple[str, ...] = (
    "Times are medians of calls made in turn with the other implementations, on the same numbers; ± is half the "
    "interquartile range. all three: the sum of the medians of the three passes.",
    f"On a CPU, calls are made {_IN_TURN}",
    "Gradients are computed by automatic differentiation, those of the input and those of the kernels separately; the "
    "forward pass is not part of them.",
    "zeros in gaps: our operators on kernels whose gaps are filled with zeros, filling included.",
    "× best of PyTorch: speed-up of ours over PyTorch in its faster layout for the row.",
    "Before each case, all implementations are compared with each other.",
)
NETWORK_NOTES: tuple[str, ...] = (
    "Times are medians of calls made in turn, on the same images, in float32; ± is half the interquartile range. A "
    "number in parentheses is the number of calls, if there were fewer than five.",
    f"Calls are made {_ORDER} {_MEMORY} Beside rivals, 20 ms pass before each, so that the threads of the others sleep.",
    "train: forward, cross-entropy, backward and a step of SGD. infer: forward in evaluation and inference mode.",
    "PyTorch: the same network in which PyTorch's convolutions compute every branch of a large kernel and every other "
    "depthwise layer, gradients included. folded: after `widekernel.fold`. accelerated: folded (for inference), then "
    "`widekernel.accelerate`, layers only. fused: its blocks as well (inference on a CPU only). "
    "onnxruntime, OpenVINO: the folded network on PyTorch's convolutions, converted to that engine. torch.compile, "
    "zentorch: the same network compiled by PyTorch in its default mode, and by AMD's extension of PyTorch.",
    "× best rival: speed-up of ours over the fastest of all rows of that network that are not ours, in either layout.",
    "× PyTorch NHWC, NCHW: speed-up over that network, neither folded nor compiled, in either layout.",
    "depthwise: share of the time in depthwise convolutions.",
    "Before anything is timed, every large-kernel layer is compared with the same layer on PyTorch's convolutions, and "
    "then the outputs of all variants, or the gradients of one step.",
)
SWEEP_NOTES: tuple[str, ...] = (
    "A cell is one pass of one convolution in one layout of our operator. The cells measured so far are spread evenly over "
    "passes, kernels, maps, channels and batches; a longer sweep with the same seed contains a shorter one.",
    "Times are medians of calls made in turn, on the same numbers; ± is half the interquartile range. A number in "
    "parentheses is the number of calls, if there were fewer than five.",
    f"Calls are made {_IN_TURN}",
    "× best, × same layout: speed-up of ours over PyTorch in its faster layout, and in the layout of our call; in the first "
    "table, the geometric mean over the cells.",
    "~: an estimate. A call of PyTorch that would have taken longer than `longest` seconds was timed on fewer images, and "
    "its time multiplied by the ratio of their numbers; the columns torch_nchw_images and torch_nhwc_images of the CSV file "
    "have the number of images.",
    "runs on: the backend that computes the call by default. Where that is PyTorch, the speed-up in the same layout differs "
    "from 1 by the overhead of our call, and by what our call does otherwise, such as copying what it crops for a kernel of "
    "even size.",
    "ahead: more than × 1.",
    "of limit: the time of direct computation at the FMA peak, or of reading and writing everything once, whichever is "
    "longer, relative to our time.",
    "Kernels of even sizes: PyTorch pads one row and one column too many, which are cropped from its output; for its "
    "gradients, the gradient of the output is extended by zeros.",
    _INPUT_GRADIENT,
    "Before the first cell of each class of kernels and maps, the operator is compared with its definition in float64; "
    "before each cell, all implementations are compared with each other.",
)
DEVICE_OPERATOR_NOTES: tuple[str, ...] = (
    "Times are device times, by CUDA events: medians of calls made in turn with the other implementations, on the same "
    "random numbers. Before each call, a buffer of at least twice the L2 cache is zeroed and read, untimed, so that the "
    "caches are cold and the host has launched the call before the device reaches it. Every implementation first makes one "
    "untimed call, in which it compiles, and cuDNN selects its algorithm. ± is half the interquartile range. A number in "
    "parentheses is the number of calls, if there were fewer than five: an implementation that takes more than 0.2 s is "
    "called once.",
    "dtype: type of all tensors; tf32 is float32 tensors with `torch.set_float32_matmul_precision('high')` and cuDNN's TF32 "
    "allowed, float32 with neither. PyTorch's convolutions run with `cudnn.benchmark` on.",
    "× best, × NCHW: speed-up of ours over PyTorch in its faster layout, and in its default layout. PyTorch's times are "
    "the same in the two rows of a pass.",
    "TFLOP/s count two operations for each tap that lies on a pixel, and none for padding.",
    "floor: the time of these operations at the speed of a large matrix product in that type, or of reading and writing "
    "everything once at the speed of a large copy, whichever is longer. For float32, the speed is that of the strict "
    "product or a third of TF32's, whichever is faster, because three TF32 products are equally accurate.",
    "of floor: a share of 1 cannot be reached if the floor is matmul: as a matrix product, a convolution is a banded "
    "Toeplitz matrix, which needs 1.3 to 1.7 times the operations counted here in tiles that the hardware supports.",
    _INPUT_GRADIENT,
    "float64 error: largest difference between the timed call and float64, in the first and last image, relative to the "
    "largest number; the limit is 1e-5 in float32, 2e-3 in tf32, 4e-3 in float16 and 1.6e-2 in bfloat16. All "
    "implementations are compared with each other on the whole batch, within twice that (1e-4 in float32). An "
    "implementation that differs by more has no times.",
)
DEVICE_NETWORK_NOTES: tuple[str, ...] = (
    "Times are device times, by CUDA events: medians of calls made in turn, on the same images; ± is half the "
    "interquartile range. A number in parentheses is the number of calls, if there were fewer than five. Every variant "
    "first makes one untimed call.",
    "dtype: bfloat16 and float16 by autocast, with parameters in float32 (float16 without scaling the loss); tf32 is "
    "float32 with `torch.set_float32_matmul_precision('high')` and cuDNN's TF32 allowed. `cudnn.benchmark` is on.",
    *NETWORK_NOTES[2:4],
    *NETWORK_NOTES[5:6],
    "× best of PyTorch: speed-up over the fastest of PyTorch's variants, in either layout, folded or not. Compiled rows, "
    "for which all variants were timed in turn once more, are compared with compiled and uncompiled variants.",
    "depthwise: share of the time in depthwise convolutions, measured in a separate call.",
    "Before anything is timed, every large-kernel layer is compared with the same layer on PyTorch's convolutions, and "
    "then the outputs of all variants, or the gradients of one step: on two images in strict float32, where a "
    "difference is meaningful. The outputs of compiled networks are compared with those before compiling, in the type "
    "that is timed.",
)
