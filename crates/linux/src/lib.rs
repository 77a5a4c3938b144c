//! The Linux view of a guest: processes, modules, sockets, files.
