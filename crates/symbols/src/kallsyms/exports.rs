//! The symbols that the kernel exports to modules (`__ksymtab`), for kernels whose kallsyms has no data symbols.
