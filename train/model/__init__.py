"""The DeepSeek-V3 model as pure math: attention, experts, blocks, multi-token prediction. Imports `kernels` only."""
