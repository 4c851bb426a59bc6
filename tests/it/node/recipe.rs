//! README's section on the recipe, run as it is written: a shell gets each command, and what it prints must be what README
//! says, times and identifiers aside. A command may take a moment to come true, as it may for whoever types it.
//!
//! Only the images are others: `kubectl apply` replaces those that README and `deploy` name by those of this build. The
//! node's controller manager signs for two minutes at most, so the day that a kubeconfig lasts is over by then.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path, time::Duration};

use tokio::{
    process::Command,
    time::{sleep, timeout},
};

use super::deployed::{deployed, text};
use crate::cluster::{CSRD_IMAGE, RealNode, SHELL_IMAGE};

const README: &str = include_str!("../../../README.md");
const SECTION: &str = "\n## Instead of the recipe\n";
/// More than a kubeconfig lasts.
const PATIENCE: Duration = Duration::from_secs(180);

/// A command of README and what it prints.
#[derive(Default)]
struct Step {
    command: String,
    output: String,
}

#[tokio::test]
#[ignore = "needs root and a node: tests/cluster/run"]
async fn the_recipe_in_the_readme_does_what_it_says() {
    let node = deployed().await;
    let folder = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy"), folder.path().join("deploy"))
        .unwrap();
    write_kubectl(node, folder.path());
    let steps = steps();
    assert!(steps.len() > 10, "{SECTION} is another now");
    for step in steps {
        let mut said: Vec<String> = Vec::new();
        let as_written = async {
            loop {
                let printed = run(node, folder.path(), &step.command).await;
                if same(&printed) == same(&step.output) {
                    return;
                }
                if said.last() != Some(&printed) {
                    said.push(printed);
                }
                sleep(Duration::from_secs(1)).await;
            }
        };
        if timeout(PATIENCE, as_written).await.is_err() {
            panic!("$ {}\nREADME: {}\nsaid: {said:#?}", step.command, step.output);
        }
    }
}

/// The commands of the section's consoles: after `$`, to the end of the line or of what that leaves open.
fn steps() -> Vec<Step> {
    let section = README.split_once(SECTION).expect("README has the section").1;
    let section = section.split_once("\n## ").map_or(section, |(section, _)| section);
    let consoles = section.split("```console\n").skip(1).map(|console| console.split("```").next().unwrap_or_default());
    let mut steps: Vec<Step> = Vec::new();
    for line in consoles.flat_map(str::lines) {
        let step = match line.strip_prefix("$ ") {
            Some(command) => {
                steps.push(Step { command: command.to_owned(), ..Step::default() });
                continue;
            }
            None => steps.last_mut().expect("a console begins with a command"),
        };
        let is_open = step.command.ends_with(['\\', '|'])
            || step.command.contains("<<'YAML'") && !step.command.ends_with("\nYAML");
        let (part, before, after) = if is_open { (&mut step.command, "\n", "") } else { (&mut step.output, "", "\n") };
        *part += &[before, line, after].concat();
    }
    steps
}

/// The admin's kubectl, but for the images.
fn write_kubectl(node: &RealNode, folder: &Path) {
    let kubectl = format!("{} kubectl", node.cluster.binary.display());
    let images = format!("sed -e 's|ghcr.io/csrd/csrd:.*|{CSRD_IMAGE}|' -e 's|image: busybox|image: {SHELL_IMAGE}|'");
    let script = format!(
        "#!/bin/sh\ncase \"$1 $2\" in\n'apply -k') {kubectl} kustomize \"$3\" | {images} | {kubectl} apply -f - ;;\n\
         'apply -f') {images} | {kubectl} \"$@\" ;;\n*) exec {kubectl} \"$@\" ;;\nesac\n"
    );
    fs::write(folder.join("kubectl"), script).unwrap();
    fs::set_permissions(folder.join("kubectl"), fs::Permissions::from_mode(0o755)).unwrap();
}

/// All that the command prints, as a terminal would show it.
async fn run(node: &RealNode, folder: &Path, command: &str) -> String {
    let mut shell = Command::new("bash");
    shell.args(["-c", &format!("exec 2>&1; PATH=$PWD:$PATH\n{command}")]).current_dir(folder);
    shell.env("KUBECONFIG", node.cluster.kubeconfig()).env("HOME", folder);
    text(&shell.output().await.unwrap())
}

/// The words, but for those that differ from run to run: whatever has a digit and is no plain number.
fn same(text: &str) -> Vec<&str> {
    let differs = |word: &str| word.contains(|c: char| c.is_ascii_digit()) && word.parse::<u32>().is_err();
    let same = |word| match word {
        _ if differs(word) => "#",
        // The first try may have come half the way.
        "unchanged" | "configured" => "created",
        _ => word,
    };
    text.split_whitespace().map(same).collect()
}
