//! `devices`: what there is, what each can do, whether it works, which one would be chosen and why.

use anyhow::Result;
use gatedelta::device::{self, Candidate, VARIABLE, class_name};
use gatedelta::tune::Kind;

use crate::say;
use crate::table::bytes;

/// Prints the account of all devices.
///
/// # Errors
/// A device named by the environment that does not exist or does not work.
pub fn run() -> Result<()> {
    let account = device::list();
    let opened = device::open(None);
    let chosen = opened.as_ref().ok().and_then(|(_, account)| account.chosen.map(|i| &account.candidates[i]));
    let mut text = String::new();
    for candidate in &account.candidates {
        let is_chosen = chosen.is_some_and(|c| (&c.name, &c.driver) == (&candidate.name, &candidate.driver));
        text.push_str(if is_chosen { "* " } else { "  " });
        text.push_str(&candidate.name);
        text.push('\n');
        for (what, value) in facts(candidate) {
            text.push_str(&format!("    {what:<18}{value}\n"));
        }
        text.push('\n');
    }
    say(&text);
    let lavapipe = |c: &Candidate| c.kind == Kind::WebGpu && c.name.to_lowercase().contains("llvmpipe");
    if !account.candidates.iter().any(lavapipe) {
        say("lavapipe, the software Vulkan driver, was not found (Debian and Ubuntu: mesa-vulkan-drivers)\n");
    }
    let (_, account) = opened?;
    say(&format!("* chosen: {}\n", account.summary()));
    if let Ok(name) = std::env::var(VARIABLE) {
        say(&format!("  {VARIABLE} is set to {name:?}\n"));
    }
    Ok(())
}

fn facts(candidate: &Candidate) -> Vec<(&'static str, String)> {
    let mut facts = vec![
        ("backend", backend_name(candidate.kind).to_string()),
        ("class", class_name(candidate.class).to_string()),
        ("driver", candidate.driver.clone()),
        ("verdict", candidate.verdict.to_string()),
    ];
    if let Some(caps) = &candidate.caps {
        let yes = |b: bool| if b { "yes" } else { "no" };
        if caps.kind == Kind::Cpu {
            facts.push(("threads", caps.threads.to_string()));
        } else {
            facts.push(("largest binding", bytes(caps.max_binding)));
            facts.push(("largest buffer", bytes(caps.max_buffer)));
            facts.push(("alignment", bytes(caps.align)));
            facts.push(("workgroup memory", bytes(caps.workgroup_memory as u64)));
            facts.push(("workgroup threads", caps.workgroup_threads.to_string()));
            let subgroups = match caps.subgroup {
                None => "not usable".to_string(),
                Some((a, b)) if a == b => format!("{a} threads"),
                Some((a, b)) => format!("{a} to {b} threads"),
            };
            facts.push(("subgroups", subgroups));
            facts.push(("f16 arithmetic", yes(caps.f16).into()));
        }
        facts.push(("memory", caps.memory.map_or("not known".into(), bytes)));
    }
    facts
}

/// The backend in a word.
pub fn backend_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Cpu => "cpu",
        Kind::WebGpu => "wgpu",
        Kind::Cuda => "cuda",
    }
}
