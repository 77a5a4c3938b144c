//! Socket addresses out of a caller's memory (include/uapi/linux/{un,in,in6,netlink,vm_sockets}.h).

use std::net::{Ipv4Addr, Ipv6Addr};

use vmsight_linux::text::guest_text;

/// `sizeof(struct sockaddr_storage)`: no address is longer.
pub(super) const MAX_ADDRESS: usize = 128;

/// An address in words; `None` where it is too short to have a family.
pub(super) fn describe(bytes: &[u8]) -> Option<String> {
    let u16_at = |at: usize| Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
    let u32_at = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    let port = || Some(u16::from_be_bytes(bytes.get(2..4)?.try_into().ok()?));
    let family = u16_at(0)?;
    let known = match family {
        1 => unix(bytes.get(2..)?),
        2 => inet(bytes.get(4..8)?, port()),
        10 => {
            let octets: [u8; 16] = bytes.get(8..24)?.try_into().ok()?;
            Some(format!("inet6 [{}]:{}", Ipv6Addr::from(octets), port()?))
        }
        16 => Some(format!("netlink {} groups {:#x}", u32_at(4)?, u32_at(8)?)),
        40 => Some(format!("vsock {}:{}", u32_at(8)?, u32_at(4)?)),
        _ => None,
    };
    Some(known.unwrap_or_else(|| {
        let rest: String = bytes.iter().skip(2).map(|b| format!("{b:02x}")).collect();
        format!("family {family} {rest}")
    }))
}

fn inet(octets: &[u8], port: Option<u16>) -> Option<String> {
    let octets: [u8; 4] = octets.try_into().ok()?;
    Some(format!("inet {}:{}", Ipv4Addr::from(octets), port?))
}

/// A path, or a name in the abstract namespace, written with @ for its zero byte as tools do.
fn unix(path: &[u8]) -> Option<String> {
    Some(match path.split_first() {
        None => "unix (unnamed)".to_owned(),
        Some((0, name)) => format!("unix @{}", guest_text(name)),
        Some(_) => {
            let end = path.iter().position(|b| *b == 0).unwrap_or(path.len());
            format!("unix {}", guest_text(path.get(..end)?))
        }
    })
}

#[cfg(test)]
mod tests {
    use super::describe;

    #[test]
    fn every_family_that_the_lab_uses() {
        assert_eq!(
            describe(&[2, 0, 0, 80, 127, 0, 0, 1, 0, 0]).unwrap(),
            "inet 127.0.0.1:80"
        );
        let mut v6 = vec![10, 0, 0x1f, 0x90, 0, 0, 0, 0];
        v6.extend([0; 15]);
        v6.push(1);
        assert_eq!(describe(&v6).unwrap(), "inet6 [::1]:8080");
        assert_eq!(describe(b"\x01\0/run/x\0junk").unwrap(), "unix /run/x");
        assert_eq!(describe(b"\x01\0\0name").unwrap(), "unix @name");
        assert_eq!(describe(b"\x01\0").unwrap(), "unix (unnamed)");
        assert_eq!(
            describe(&[40, 0, 0, 0, 0x39, 5, 0, 0, 2, 0, 0, 0]).unwrap(),
            "vsock 2:1337"
        );
    }

    #[test]
    fn too_short_is_said_and_not_read() {
        assert_eq!(describe(&[]), None);
        assert_eq!(describe(&[2]), None);
        assert_eq!(describe(&[2, 0, 0]), None);
        assert_eq!(describe(&[99, 0, 0xab]).unwrap(), "family 99 ab");
    }
}
