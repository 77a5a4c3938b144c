//! Findings as SARIF 2.1.0 (OASIS), for code-scanning dashboards and SIEMs.
//!
//! An address in a guest is given as a text: SARIF's own numbers do not hold those of a kernel.

use std::io::Write;

use anyhow::Result;
use serde_json::{Value, json};
use vmsight_analysis::{Check, Finding, Outcome as Checked, Severity};

use super::techniques;
use crate::output;

/// One run with its rules, results and what could not be checked.
pub(super) fn write(
    out: &mut dyn Write,
    target: &str,
    checks: &[&Check],
    outcomes: &[Checked],
) -> Result<()> {
    output::json::write(&mut *out, &document(target, checks, outcomes))?;
    writeln!(out)?;
    Ok(())
}

fn document(target: &str, checks: &[&Check], outcomes: &[Checked]) -> Value {
    let notifications: Vec<Value> = outcomes
        .iter()
        .flat_map(|o| o.notes.iter().map(move |note| (o, note)))
        .map(|(outcome, note)| {
            json!({
                "level": if outcome.failed { "error" } else { "note" },
                "message": { "text": note },
                "associatedRule": { "id": outcome.check },
            })
        })
        .collect();
    let results: Vec<Value> = outcomes
        .iter()
        .flat_map(|o| &o.findings)
        .map(|finding| result(finding, checks))
        .collect();
    json!({
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [{
            "tool": { "driver": {
                "name": "vmsight",
                "version": env!("CARGO_PKG_VERSION"),
                "rules": checks.iter().map(|c| rule(c)).collect::<Vec<_>>(),
            }},
            "automationDetails": { "id": format!("vmsight/check/{target}") },
            "invocations": [{
                "executionSuccessful": outcomes.iter().all(|o| !o.failed),
                "toolExecutionNotifications": notifications,
            }],
            "results": results,
            "properties": { "target": target },
        }],
    })
}

fn rule(check: &Check) -> Value {
    json!({
        "id": check.name,
        "shortDescription": { "text": check.summary },
        "fullDescription": { "text": format!("Compares {}", check.compares) },
        "help": { "text": format!("{}\nCannot see: {}", check.why, check.blind_spots.join(" ")) },
        "properties": { "tags": techniques(check) },
    })
}

fn result(finding: &Finding, checks: &[&Check]) -> Value {
    let level = match finding.severity {
        Severity::Low => "note",
        Severity::Medium => "warning",
        Severity::High | Severity::Critical => "error",
    };
    let evidence: Vec<String> = finding.evidence.iter().map(ToString::to_string).collect();
    let text = format!("{}: {}", finding.subject, finding.explanation);
    let mut location = json!({
        "logicalLocations": [{ "fullyQualifiedName": finding.subject, "kind": "object" }],
    });
    if let Some(at) = finding.address {
        location["physicalLocation"] = json!({ "address": { "fullyQualifiedName": at.to_string() } });
    }
    json!({
        "ruleId": finding.check,
        "ruleIndex": checks.iter().position(|c| c.name == finding.check),
        "level": level,
        "message": { "text": text },
        "locations": [location],
        "partialFingerprints": { "subject/v1": format!("{}:{}", finding.check, finding.subject) },
        "properties": {
            "severity": finding.severity,
            "certainty": finding.certainty,
            "module": finding.module,
            "evidence": evidence,
        },
    })
}
