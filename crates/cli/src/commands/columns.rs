//! The columns of each listing: the keys of its rows in JSON, whatever the guest at hand has.

use vmsight_linux::bpf::BpfObject;
use vmsight_linux::file::OpenFile;
use vmsight_linux::iface::Interface;
use vmsight_linux::kmsg::KernelMessage;
use vmsight_linux::module::Module;
use vmsight_linux::mount::Mount;
use vmsight_linux::perf::PerfEvent;
use vmsight_linux::socket::{Socket, UnixSocket};
use vmsight_linux::{Cgroup, Info, Mapping, Process, Resource, SlabCache, StackFrame, Thread};
use vmsight_symbols::layout::Summary;

use crate::output::Row;

/// Names the columns of a library's row type by its fields, `field as "key"` where the key is another. A field that is
/// forgotten, or that is there no more, does not compile.
macro_rules! columns {
    ($($row:ident { $($field:ident $(as $key:literal)?),+ $(,)? })+) => {
        $(
            impl Row for $row {
                const COLUMNS: &'static [&'static str] = {
                    #[allow(dead_code)] // here to be checked, not to be called
                    fn complete(row: $row) {
                        let $row { $($field: _),+ } = row;
                    }
                    &[$(columns!(@key $field $($key)?)),+]
                };
            }
        )+

        #[cfg(test)]
        mod keys_as_serialised {
            use super::*;

            #[test]
            fn are_the_columns() {
                $(
                    let row = $row { $($field: Default::default()),+ };
                    super::tests::assert_keys(&row);
                )+
            }
        }
    };
    (@key $field:ident) => { stringify!($field) };
    (@key $field:ident $key:literal) => { $key };
}

impl Row for Process {
    const COLUMNS: &'static [&'static str] = Process::FIELDS;
}

columns! {
    Thread {
        tid, pid, name, state, kernel_thread, cpu, running, nice, priority, policy, start_ticks, start_time,
        utime_ticks, stime_ticks, stack, task, problems,
    }
    StackFrame {
        pid, tid, name, state, kernel_thread, switches, depth, address, symbol, module, how, slot, task, problems,
    }
    Mapping {
        pid, start, end, size_kb, perms, offset, device, inode, path, deleted, flags, vma, problems,
    }
    Cgroup {
        hierarchy, controllers, path, id, tasks, container, container_runtime, address, problems,
    }
    OpenFile {
        pid, tid, name, fd, kind as "type", access, flags, pos, mount_id, device, rdev, inode, links, size,
        path, deleted, unreachable, endpoint, peers, socket, address, problems,
    }
    Mount {
        namespace, mount_id, parent_id, device, root, mount_point, options, propagation, fs_type, source,
        super_options, super_options_known, unreachable, pid, processes, address, problems,
    }
    Module {
        name, size, refcount, used_by, permanent, state, taints, base, ranges, version, srcversion,
        build_id, arguments, sections, parameters, address, problems,
    }
    Socket {
        family, protocol, kind, state, local_address, local_port, remote_address, remote_port,
        receive_queue, send_queue, uid, inode, owners, namespace, interface, cookie, groups, listed, in_ports,
        address, problems,
    }
    UnixSocket {
        kind, state, path, inode, owners, peer_inode, peer_path, peer_owners, uid, references,
        receive_queue, send_queue, namespace, listed, address, peer, problems,
    }
    Info {
        release, banner, build_id, machine, hostname, domainname, text, text_physical, kaslr_offset, paging,
        dtb, boot_time, time, uptime_s, clocksource, cpus_online, cpus_present, cpus_possible,
        memory_total_kb, memory_physical_kb, cmdline, taint, taint_mask, lsm, vmcoreinfo, evidence,
        problems,
    }
    Resource {
        space, start, end, size, depth, name, address, problems,
    }
    SlabCache {
        name, object_size, size, align, objects_per_slab, pages_per_slab, slabs, objects, active, bytes, flags, constructor,
        address, problems,
    }
    BpfObject {
        kind, id, type_name as "type", name, tag, load_time, loaded_ns, uid, attach_type, target, program, maps, instructions,
        verified_instructions, jited_address, jited_size, key_size, value_size, max_entries, flags, references,
        owners, address, problems,
    }
    PerfEvent {
        id, type_name as "type", event, config, source, state, pid, tid, name, cpu, sample_period, sample_frequency,
        handler, handler_address, opened_by, owners, address, problems,
    }
    KernelMessage {
        seq, time_us, facility, level, caller, comm, continued, text, subsystem, device, problems,
    }
    Summary {
        id, kind, name, size, members,
    }
}

impl Row for Interface {
    // The four counters are a structure of their own in the library, and are not there where they are not known.
    const COLUMNS: &'static [&'static str] = &[
        "namespace",
        "pid",
        "index",
        "name",
        "type",
        "kind",
        "state",
        "flags",
        "promiscuity",
        "mtu",
        "mac",
        "ipv4",
        "ipv6",
        "master",
        "rx_packets",
        "rx_bytes",
        "tx_packets",
        "tx_bytes",
        "address",
        "problems",
    ];
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::to_map;
    use vmsight_linux::iface::Counters;

    pub(super) fn assert_keys<T: Row>(row: &T) {
        let map = to_map(row).unwrap();
        let keys: Vec<&str> = map.keys().map(String::as_str).collect();
        assert_eq!(keys, T::COLUMNS, "{}", std::any::type_name::<T>());
        assert!(map.values().all(|v| !v.is_object()), "a row is flat: {map:?}");
    }

    #[test]
    fn an_interface_has_its_counters_among_its_columns() {
        assert_keys(&Interface {
            namespace: 1,
            pid: None,
            index: 1,
            name: "lo".into(),
            link_type: "loopback".into(),
            kind: None,
            state: "up",
            flags: Vec::new(),
            promiscuity: 0,
            mtu: 65536,
            mac: None,
            ipv4: vec!["127.0.0.1/8".into()],
            ipv6: Vec::new(),
            master: None,
            counters: Some(Counters {
                rx_packets: 0,
                rx_bytes: 0,
                tx_packets: 0,
                tx_bytes: 0,
            }),
            address: Default::default(),
            problems: Vec::new(),
        });
    }
}
