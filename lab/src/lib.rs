//! Real guests for tests and demos: kernels, initramfs, workloads with ground truth.
