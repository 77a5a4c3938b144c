//! OpenSSH's agent.

use std::collections::BTreeSet;

use vmsight_analysis::keys::{Form, Material, find_in};
use vmsight_lab::Guest;

use crate::support::{SUBJECT, shell};

/// An agent, and the keys that it was given.
pub(crate) struct Made {
    pid: i32,
    keys: BTreeSet<(String, String)>,
}

/// Kind and secret.
fn told(material: &Material) -> (String, String) {
    (material.kind(), material.secret())
}

pub(crate) fn make(guest: &Guest) -> Made {
    let output = shell(
        guest,
        "busybox mkdir -p bin /etc; busybox --install -s bin
         echo root:x:0:0:root:/tmp:/bin/sh >/etc/passwd
         ssh-keygen -q -t ed25519 -N '' -C '' -f ed25519
         ssh-keygen -q -t rsa -b 2048 -N '' -C '' -f rsa
         ssh-keygen -q -t ecdsa -b 384 -N '' -C '' -f ecdsa
         eval \"$(ssh-agent -s -a /tmp/agent)\" >/dev/null
         ssh-add -q ed25519 rsa ecdsa
         ssh-add -l >/dev/null
         cat ed25519 rsa ecdsa
         echo pid=$SSH_AGENT_PID",
    );
    let pid = output.trim_end().rsplit_once("pid=").unwrap().1.parse().unwrap();
    let files = find_in(output.as_bytes());
    Made {
        pid,
        keys: files.iter().map(|(_, _, material)| told(material)).collect(),
    }
}

#[test]
fn an_agents_keys_are_unshielded_and_are_those_that_it_was_given() {
    let subject = &*SUBJECT;
    let made = &subject.agent;
    let kinds: Vec<&str> = made.keys.iter().map(|(kind, _)| kind.as_str()).collect();
    assert_eq!(kinds, ["ed25519", "p-384", "rsa-2048"]);
    let found = subject.of(made.pid, Form::Shielded);
    let found: BTreeSet<_> = found.map(|owned| told(&owned.hit.material)).collect();
    assert_eq!(found, made.keys, "{:?}", subject.notes);
    // It keeps them in no other way.
    for form in [Form::OpenSsh, Form::Pem] {
        assert_eq!(subject.of(made.pid, form).count(), 0, "{form:?}");
    }
    // Nobody else keeps any like this.
    let others = subject
        .found
        .iter()
        .filter(|owned| owned.hit.form == Form::Shielded);
    assert!(
        others
            .flat_map(|owned| &owned.holders)
            .all(|holder| holder.pid == Some(made.pid))
    );
}
