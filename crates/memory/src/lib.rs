//! Guest-physical memory as a source of bytes, and the address spaces over it.
