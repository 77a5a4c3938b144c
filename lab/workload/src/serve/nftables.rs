//! Filters packets by nftables, over netlink, as the program nft does.

use anyhow::{Context, Result};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, sendto, socket,
};
use std::os::fd::AsRawFd;
use vmsight_workload::orders::Account;

// Of include/uapi/linux/netfilter/nfnetlink.h and nf_tables.h.
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const SUBSYSTEM: u16 = 10;
const NEW_TABLE: u16 = SUBSYSTEM << 8;
const NEW_CHAIN: u16 = SUBSYSTEM << 8 | 3;
const NFPROTO_IPV4: u8 = 2;
const NAME: u16 = 1;
const CHAIN_TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;
const CHAIN_HOOK: u16 = 4;
const CHAIN_TYPE: u16 = 7;
const HOOK_NUMBER: u16 = 1;
const HOOK_PRIORITY: u16 = 2;
const NESTED: u16 = 0x8000;
/// `NF_INET_LOCAL_IN`.
const LOCAL_IN: u32 = 1;
// Of include/uapi/linux/netlink.h.
const REQUEST: u16 = 1;
const ACKNOWLEDGE: u16 = 4;
const CREATE: u16 = 0x400;
const ERROR: u16 = 2;

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = ((value.len() + 4) as u16).to_le_bytes().to_vec();
    bytes.extend(kind.to_le_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn message(kind: u16, flags: u16, sequence: u32, family: u8, resource: u16, attributes: &[u8]) -> Vec<u8> {
    let mut bytes = ((20 + attributes.len()) as u32).to_le_bytes().to_vec();
    bytes.extend(kind.to_le_bytes());
    bytes.extend((REQUEST | flags).to_le_bytes());
    bytes.extend(sequence.to_le_bytes());
    bytes.extend(0u32.to_le_bytes());
    // `struct nfgenmsg`.
    bytes.extend([family, 0]);
    bytes.extend(resource.to_be_bytes());
    bytes.extend(attributes);
    bytes
}

/// Makes a table `vmsight` with a chain `input`, which lets everything pass.
pub(super) fn filter() -> Result<Account> {
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkNetFilter,
    )
    .context("netlink")?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
    let hook = [
        attribute(HOOK_NUMBER, &LOCAL_IN.to_be_bytes()),
        attribute(HOOK_PRIORITY, &0u32.to_be_bytes()),
    ]
    .concat();
    let chain = [
        attribute(CHAIN_TABLE, b"vmsight\0"),
        attribute(CHAIN_NAME, b"input\0"),
        attribute(CHAIN_HOOK | NESTED, &hook),
        attribute(CHAIN_TYPE, b"filter\0"),
    ]
    .concat();
    let flags = CREATE | ACKNOWLEDGE;
    let batch = [
        message(BATCH_BEGIN, 0, 1, 0, SUBSYSTEM, &[]),
        message(
            NEW_TABLE,
            flags,
            2,
            NFPROTO_IPV4,
            0,
            &attribute(NAME, b"vmsight\0"),
        ),
        message(NEW_CHAIN, flags, 3, NFPROTO_IPV4, 0, &chain),
        message(BATCH_END, 0, 4, 0, SUBSYSTEM, &[]),
    ]
    .concat();
    sendto(
        socket.as_raw_fd(),
        &batch,
        &NetlinkAddr::new(0, 0),
        MsgFlags::empty(),
    )?;
    let mut account = Account::default();
    while account.values.len() < 2 {
        let mut answer = [0; 4096];
        let got = recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty())?;
        let mut rest = &answer[..got];
        while let [a, b, c, d, kind @ ..] = rest {
            let length = u32::from_le_bytes([*a, *b, *c, *d]) as usize;
            let error = rest.get(16..20).and_then(|bytes| bytes.try_into().ok());
            if kind.starts_with(&ERROR.to_le_bytes()) {
                let error = i32::from_le_bytes(error.context("an answer that is cut")?);
                account.values.push(u64::from(error.unsigned_abs()));
            }
            rest = rest.get(length.max(16).next_multiple_of(4)..).unwrap_or_default();
        }
    }
    Ok(account)
}
