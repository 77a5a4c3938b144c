//! OpenSSL's client and server.

use std::collections::BTreeSet;

use vmsight_analysis::keys::{Form, Material};
use vmsight_lab::Guest;

use crate::support::{SUBJECT, shell};

/// What the connections are made with, and how many secrets each has.
const CONNECTIONS: [(&str, usize); 4] = [
    ("-tls1_3 -ciphersuites TLS_AES_256_GCM_SHA384", 5),
    ("-tls1_3 -ciphersuites TLS_CHACHA20_POLY1305_SHA256", 5),
    ("-tls1_2 -cipher ECDHE-ECDSA-AES256-GCM-SHA384", 1),
    ("-tls1_2 -cipher ECDHE-ECDSA-AES128-SHA", 1),
];

/// One end of a connection.
pub(crate) struct Made {
    what: String,
    pid: i32,
    /// What OpenSSL itself wrote.
    log: BTreeSet<String>,
    secrets: usize,
}

pub(crate) fn make(guest: &Guest) -> Vec<Made> {
    shell(
        guest,
        "printf '[req]\\ndistinguished_name=dn\\n[dn]\\n' >openssl.cnf
         openssl req -config openssl.cnf -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes \\
             -keyout tls.key -out tls.crt -subj /CN=lab -days 2",
    );
    CONNECTIONS
        .into_iter()
        .zip(4433..)
        .flat_map(|((how, secrets), port)| connect(guest, how, port, secrets))
        .collect()
}

/// Both ends of a connection that stays, after a line went each way.
fn connect(guest: &Guest, how: &str, port: u16, secrets: usize) -> Vec<Made> {
    let output = shell(
        guest,
        &format!(
            "mkfifo up.{port} down.{port}
             sleep 100000 >up.{port} 2>/dev/null &
             sleep 100000 >down.{port} 2>/dev/null &
             openssl s_server -accept {port} -cert tls.crt -key tls.key {how} -quiet -keylogfile server.{port} \\
                 <down.{port} >got-up.{port} 2>&1 &
             server=$!
             until netstat -ltn | grep -q :{port}; do sleep 0.1; done
             openssl s_client -connect 127.0.0.1:{port} {how} -quiet -keylogfile client.{port} \\
                 <up.{port} >got-down.{port} 2>&1 &
             client=$!
             echo up >up.{port}
             until grep -q up got-up.{port}; do sleep 0.1; done
             echo down >down.{port}
             until grep -q down got-down.{port}; do sleep 0.1; done
             for end in client server; do echo \"[$end] $(eval echo \\$$end)\"; grep -v '^#' $end.{port}; done"
        ),
    );
    let ends = output.split('[').skip(1).map(|end| {
        let mut lines = end.lines();
        let (name, pid) = lines.next().unwrap().split_once("] ").unwrap();
        Made {
            what: format!("{name} {how}"),
            pid: pid.parse().unwrap(),
            log: lines.map(str::to_lowercase).collect(),
            secrets,
        }
    });
    ends.collect()
}

#[test]
fn what_is_found_of_each_connection_is_what_openssl_wrote_into_its_key_log() {
    let subject = &*SUBJECT;
    assert_eq!(subject.sessions.len(), 2 * CONNECTIONS.len());
    for made in &subject.sessions {
        let found = subject.of(made.pid, Form::OpenSsl);
        let found: BTreeSet<String> = found
            .map(|owned| match &owned.hit.material {
                Material::Tls(secret) => secret.line().to_lowercase(),
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(made.log.len(), made.secrets, "{}: {:?}", made.what, made.log);
        assert_eq!(found, made.log, "{}: {:?}", made.what, subject.notes);
    }
}
