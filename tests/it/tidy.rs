//! Keeps the layers true: reads every file under `src/` as tokens and compares what it names with [`TABLE`] and [`HOMES`].
//!
//! Tokens, not text: comments and strings cannot trip it, paths inside macros cannot hide from it. Code under
//! `#[cfg(test)]` and files named `tests.rs` are left out, since a test may reach across layers. Not checked: a parent
//! that names its own child by a bare path, which is how a module shows its parts.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs,
    path::Path,
    str::FromStr as _,
};

use proc_macro2::{Delimiter, Group, Ident, Spacing, TokenStream, TokenTree};

/// Who may import whom. A path belongs to the row with the longest prefix of it; a row may always name itself.
const TABLE: &[(&str, &[&str])] = &[
    ("proto", &[]),
    ("text", &[]),
    ("clock", &[]),
    ("tasks", &[]),
    ("backoff", &[]),
    ("metrics", &[]),
    ("spiffe", &[]),
    ("files", &[]),
    ("socket", &[]),
    ("telemetry", &["text"]),
    ("kubernetes", &["telemetry", "backoff"]),
    ("rate", &[]),
    ("x509", &["spiffe"]),
    ("account", &["metrics"]),
    ("attest::workload", &["account", "text"]),
    ("policy", &["x509", "attest::workload", "text"]),
    ("attest", &["account", "attest::workload", "attest::pods", "kubernetes", "clock"]),
    ("attest::pods", &["attest", "attest::workload", "kubernetes", "clock"]),
    ("policy::watch", &["policy", "files", "metrics", "kubernetes"]),
    ("trust", &["x509", "files", "kubernetes"]),
    (
        "signer",
        &["attest::workload", "policy", "x509", "clock", "kubernetes", "metrics", "backoff", "telemetry", "text"],
    ),
    ("issue", &["attest::workload", "policy", "x509", "signer", "clock"]),
    (
        "hub",
        &[
            "account",
            "attest::workload",
            "policy",
            "x509",
            "signer",
            "issue",
            "clock",
            "backoff",
            "rate",
            "metrics",
            "telemetry",
            "attest::pods",
        ],
    ),
    (
        "server",
        &[
            "account",
            "proto",
            "spiffe",
            "x509",
            "attest",
            "attest::workload",
            "policy",
            "signer",
            "issue",
            "hub",
            "metrics",
            "telemetry",
            "text",
        ],
    ),
    (
        "controller",
        &[
            "attest::pods",
            "attest::workload",
            "policy",
            "policy::watch",
            "x509",
            "signer",
            "kubernetes",
            "clock",
            "backoff",
            "rate",
            "metrics",
            "telemetry",
            "text",
        ],
    ),
    ("client", &["proto", "socket", "backoff", "telemetry", "text"]),
    ("config", &["controller", "policy", "signer", "files", "socket", "telemetry", "kubernetes", "trust", "x509"]),
    ("agent", ANY),
    ("cli", ANY),
    ("main", ANY),
];

/// Composition: it puts the parts together, so it may name them all.
const ANY: &[&str] = &["*"];

/// Outside paths that only some rows may name.
const HOMES: &[(&str, &[&str])] = &[
    ("tonic", &["proto", "server", "client", "agent", "cli"]),
    (
        "kube",
        &["kubernetes", "attest", "attest::pods", "policy::watch", "trust", "signer", "controller", "agent", "cli"],
    ),
    (
        "k8s_openapi",
        &["kubernetes", "attest", "attest::pods", "policy::watch", "trust", "signer", "controller", "agent", "cli"],
    ),
    ("std::env", &["config", "cli", "main"]),
    ("anyhow", &["agent", "cli", "main"]),
];

/// Names that say nothing about what a file is for.
const EMPTY_NAMES: &[&str] = &["mod", "utils", "util", "helpers", "helper", "common", "misc", "types"];

const MAX_FILE_LINES: usize = 400;
const MAX_FUNCTION_LINES: usize = 70;

#[test]
fn the_source_keeps_its_layers_homes_and_sizes() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    read_sources(root, Path::new("src"), &mut files);
    assert!(files.len() > 10, "only {} files found under src/", files.len());
    let (mut problems, used) = check(&files);
    for (module, may_import) in TABLE.iter().filter(|(_, may_import)| *may_import != ANY) {
        for unused in may_import.iter().filter(|target| !used.contains(&(module, target))) {
            problems.push(format!("tests/it/tidy.rs: table: `{module}` may import `{unused}` and does not"));
        }
    }
    assert!(problems.is_empty(), "{} problems:\n{}", problems.len(), problems.join("\n"));
}

#[test]
fn the_crate_docs_show_this_table() {
    let said =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs")).expect("src/lib.rs is there");
    let said: Vec<&str> = said.lines().filter(|it| it.starts_with("//! | `")).collect();
    let wanted: Vec<String> = TABLE.iter().map(|(module, may_import)| row_in_docs(module, may_import)).collect();
    let (said, wanted) = (said.join("\n"), wanted.join("\n"));
    assert!(said == wanted, "src/lib.rs says:\n{said}\nand tests/it/tidy.rs says:\n{wanted}");
}

fn row_in_docs(module: &str, may_import: &[&str]) -> String {
    let may_import = match may_import {
        [] => "nothing of ours".into(),
        _ if may_import == ANY => "everything".into(),
        names => names.iter().map(|it| format!("`{it}`")).collect::<Vec<_>>().join(", "),
    };
    format!("//! | `{module}` | {may_import} |")
}

/// One file: its path from the root of the repository, with slashes, and its text.
struct Source {
    path: String,
    text: String,
}

fn read_sources(root: &Path, folder: &Path, files: &mut Vec<Source>) {
    for entry in fs::read_dir(root.join(folder)).expect("src/ can be listed") {
        let entry = entry.expect("src/ can be listed");
        let path = folder.join(entry.file_name());
        if entry.path().is_dir() {
            read_sources(root, &path, files);
        } else if path.extension().is_some_and(|it| it == "rs") {
            let text = fs::read_to_string(entry.path()).expect("a source file is readable UTF-8");
            files.push(Source { path: path.to_str().expect("file names are UTF-8").into(), text });
        }
    }
}

/// Every breach, one line each, in the order of the files, and who imports whom.
fn check(sources: &[Source]) -> (Vec<String>, Used) {
    let mut problems = Vec::new();
    let mut files = Vec::new();
    for source in sources {
        match File::parse(source) {
            Ok(file) => files.push(file),
            Err(problem) => problems.push(problem),
        }
    }
    let shown: BTreeMap<&PathTo, &PathTo> =
        files.iter().flat_map(|it| &it.shown).map(|(to, from)| (to, from)).collect();
    let mut used = BTreeSet::new();
    for file in files.iter().filter(|it| it.stem() != "tests") {
        file.check_name(&mut problems);
        file.check_imports(&shown, &mut used, &mut problems);
        file.check_sizes(&mut problems);
    }
    (problems, used)
}

/// Rows of [`TABLE`], each with another that it names.
type Used = BTreeSet<(&'static str, &'static str)>;

/// A path below the crate root, or an outside one from its crate's name on.
#[derive(Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
struct PathTo(Vec<String>);

impl PathTo {
    fn starts_with(&self, prefix: &str) -> bool {
        prefix.split("::").enumerate().all(|(at, name)| self.0.get(at).is_some_and(|it| it == name))
    }

    /// The row of [`TABLE`] with the longest prefix of this path.
    fn row(&self) -> Option<(&'static str, &'static [&'static str])> {
        TABLE.iter().copied().filter(|(module, _)| self.starts_with(module)).max_by_key(|(module, _)| module.len())
    }
}

impl fmt::Display for PathTo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("::"))
    }
}

/// What one file says, as far as a rule asks.
#[derive(Default)]
struct File {
    path: String,
    module: PathTo,
    /// Paths into our own crate and to the outside, with the line of their first word.
    ours: Vec<(usize, PathTo)>,
    outside: Vec<(usize, PathTo)>,
    /// Children shown under the parent's name: `attest::Workload` is `attest::workload::Workload`.
    shown: Vec<(PathTo, PathTo)>,
    functions: Vec<Function>,
    /// Lines that carry code.
    lines: BTreeSet<usize>,
}

struct Function {
    name: String,
    first_line: usize,
    last_line: usize,
}

impl File {
    fn parse(source: &Source) -> Result<Self, String> {
        let module = source.path.trim_start_matches("src/").trim_end_matches(".rs").split('/').map(String::from);
        let mut file = Self { path: source.path.clone(), module: PathTo(module.collect()), ..Self::default() };
        let tokens = TokenStream::from_str(&source.text)
            .map_err(|error| format!("{}:{}: syntax: {error}", source.path, error.span().start().line))?;
        let scope = if file.path == "src/lib.rs" { PathTo::default() } else { file.module.clone() };
        file.read(tokens, &scope);
        Ok(file)
    }

    fn stem(&self) -> &str {
        self.module.0.last().map_or("", String::as_str)
    }

    fn read(&mut self, tokens: TokenStream, scope: &PathTo) {
        let tokens: Vec<TokenTree> = tokens.into_iter().collect();
        let mut at = 0;
        while let Some(token) = tokens.get(at) {
            let rest = &tokens[at..];
            if let Some(length) = doc_comment(rest).or_else(|| test_item(rest)) {
                at += length;
                continue;
            }
            match token {
                TokenTree::Ident(ident) => self.read_ident(ident, &tokens, at, scope),
                TokenTree::Group(group) => self.read_group(group, &tokens[..at], scope),
                TokenTree::Punct(_) | TokenTree::Literal(_) => {
                    self.lines.extend(token.span().start().line..=token.span().end().line);
                }
            }
            at += 1;
        }
    }

    fn read_ident(&mut self, ident: &Ident, tokens: &[TokenTree], at: usize, scope: &PathTo) {
        let line = ident.span().start().line;
        let rest = &tokens[at..];
        self.lines.insert(line);
        if ident == "fn" {
            self.functions.extend(function(rest));
        }
        if !double_colon(&rest[1..]) || (at >= 2 && double_colon(&tokens[at - 2..])) {
            return;
        }
        let mut paths = Vec::new();
        flatten(rest, &PathTo::default(), &mut paths);
        let public = matches!(&tokens[..at], [.., first, keyword] if is_word(keyword, "use") && is_word(first, "pub"));
        for path in paths {
            let (root, name) = (path.0[0].as_str(), path.0.last().cloned().unwrap_or_default());
            match root {
                "self" if public => self.shown.push((join(scope, vec![name]), absolute(path, scope))),
                "crate" | "self" | "super" => self.ours.push((line, absolute(path, scope))),
                _ if public => self.shown.push((join(scope, vec![name]), join(scope, path.0))),
                _ => self.outside.push((line, path)),
            }
        }
    }

    fn read_group(&mut self, group: &Group, before: &[TokenTree], scope: &PathTo) {
        self.lines.extend([group.span_open().start().line, group.span_close().start().line]);
        match before {
            [.., keyword, TokenTree::Ident(name)] if is_word(keyword, "mod") => {
                self.read(group.stream(), &join(scope, vec![name.to_string()]));
            }
            _ => self.read(group.stream(), scope),
        }
    }

    fn check_name(&self, problems: &mut Vec<String>) {
        if EMPTY_NAMES.contains(&self.stem()) {
            problems.push(format!("{}:1: name: a file is named after what it holds, not `{}`", self.path, self.stem()));
        }
    }

    fn check_imports(&self, shown: &BTreeMap<&PathTo, &PathTo>, used: &mut Used, problems: &mut Vec<String>) {
        if self.path == "src/lib.rs" {
            return;
        }
        let Some((module, may_import)) = self.module.row() else {
            problems
                .push(format!("{}:1: layer: `{}` has no row in the table of tests/it/tidy.rs", self.path, self.module));
            return;
        };
        for (line, path) in &self.ours {
            let real =
                (1..=path.0.len()).find_map(|it| shown.get(&PathTo(path.0[..it].to_vec()))).copied().unwrap_or(path);
            used.extend(real.row().map(|(target, _)| (module, target)));
            match real.row() {
                _ if may_import == ANY => {}
                Some((target, _)) if target == module || may_import.contains(&target) => {}
                Some((target, _)) => problems.push(format!(
                    "{}:{line}: layer: `{module}` may import [{}], and this is `crate::{path}`, of `{target}`",
                    self.path,
                    may_import.join(", "),
                )),
                None => {
                    problems.push(format!("{}:{line}: layer: `crate::{path}` is in no row of the table", self.path))
                }
            }
        }
        for (line, path) in &self.outside {
            let home = HOMES.iter().find(|(outside, homes)| path.starts_with(outside) && !homes.contains(&module));
            if let Some((outside, homes)) = home {
                let homes = homes.join(", ");
                problems
                    .push(format!("{}:{line}: home: `{outside}` is for [{homes}], and this is `{module}`", self.path));
            }
        }
    }

    fn check_sizes(&self, problems: &mut Vec<String>) {
        if self.lines.len() > MAX_FILE_LINES {
            let (path, lines) = (&self.path, self.lines.len());
            problems.push(format!("{path}:1: size: {lines} lines of code, at most {MAX_FILE_LINES}"));
        }
        for Function { name, first_line, last_line } in &self.functions {
            let lines = self.lines.range(first_line..=last_line).count();
            if lines > MAX_FUNCTION_LINES {
                let path = &self.path;
                problems.push(format!(
                    "{path}:{first_line}: size: `{name}` has {lines} lines, at most {MAX_FUNCTION_LINES}"
                ));
            }
        }
    }
}

fn join(scope: &PathTo, below: Vec<String>) -> PathTo {
    PathTo([scope.0.clone(), below].concat())
}

/// `crate::`, `self::` and `super::` taken away.
fn absolute(path: PathTo, scope: &PathTo) -> PathTo {
    let mut scope = scope.clone();
    let mut words = path.0.into_iter().peekable();
    while let Some(root) = words.next_if(|it| matches!(it.as_str(), "crate" | "self" | "super")) {
        match root.as_str() {
            "crate" => scope.0.clear(),
            "super" => drop(scope.0.pop()),
            _ => {}
        }
    }
    join(&scope, words.collect())
}

/// `a::{b, c::d}` as `a::b` and `a::c::d`.
fn flatten(tokens: &[TokenTree], prefix: &PathTo, paths: &mut Vec<PathTo>) {
    let mut path = prefix.clone();
    let mut rest = tokens;
    loop {
        match rest {
            [TokenTree::Ident(name), after @ ..] => {
                path.0.push(name.to_string());
                if !double_colon(after) {
                    break;
                }
                rest = &after[2..];
            }
            [TokenTree::Group(group), ..] if group.delimiter() == Delimiter::Brace => {
                let inside: Vec<TokenTree> = group.stream().into_iter().collect();
                for part in inside.split(|it| is_punct(it, ',')).filter(|it| !it.is_empty()) {
                    flatten(part, &path, paths);
                }
                return;
            }
            _ => break,
        }
    }
    paths.push(path);
}

/// How many tokens a doc comment takes, if one begins here.
fn doc_comment(tokens: &[TokenTree]) -> Option<usize> {
    let (attribute, length) = attribute(tokens)?;
    attribute.stream().into_iter().next().filter(|it| is_word(it, "doc")).map(|_| length)
}

/// How many tokens an item under `#[cfg(test)]` takes, attributes included, if one begins here.
fn test_item(tokens: &[TokenTree]) -> Option<usize> {
    let (first, mut at) = attribute(tokens)?;
    if first.stream().to_string().replace(' ', "") != "cfg(test)" {
        return None;
    }
    while let Some((_, length)) = attribute(&tokens[at..]) {
        at += length;
    }
    let braces_end_it = !["use", "let", "const", "static", "type"].iter().any(|it| is_word(&tokens[at], it));
    let mut angles = 0;
    for (offset, token) in tokens[at..].iter().enumerate() {
        match token {
            TokenTree::Group(group) if braces_end_it && group.delimiter() == Delimiter::Brace => {
                return Some(at + offset + 1);
            }
            TokenTree::Punct(punct) => match punct.as_char() {
                ';' => return Some(at + offset + 1),
                ',' if angles == 0 => return Some(at + offset + 1),
                '<' => angles += 1,
                '>' if !is_punct(&tokens[at + offset - 1], '-') => angles -= 1,
                _ => {}
            },
            _ => {}
        }
    }
    Some(tokens.len())
}

/// The attribute that begins here, outer or inner, and how many tokens it takes.
fn attribute(tokens: &[TokenTree]) -> Option<(&Group, usize)> {
    let is_attribute = |group: &Group| group.delimiter() == Delimiter::Bracket;
    match tokens {
        [hash, TokenTree::Group(group), ..] if is_punct(hash, '#') && is_attribute(group) => Some((group, 2)),
        [hash, bang, TokenTree::Group(group), ..]
            if is_punct(hash, '#') && is_punct(bang, '!') && is_attribute(group) =>
        {
            Some((group, 3))
        }
        _ => None,
    }
}

/// The function with a body that begins here.
fn function(tokens: &[TokenTree]) -> Option<Function> {
    let [keyword, TokenTree::Ident(name), rest @ ..] = tokens else { return None };
    let body = rest.iter().take_while(|it| !is_punct(it, ';')).find_map(|it| match it {
        TokenTree::Group(group) if group.delimiter() == Delimiter::Brace => Some(group),
        _ => None,
    })?;
    let (first_line, last_line) = (keyword.span().start().line, body.span_close().end().line);
    Some(Function { name: name.to_string(), first_line, last_line })
}

fn double_colon(tokens: &[TokenTree]) -> bool {
    matches!(tokens, [TokenTree::Punct(one), two, ..]
        if one.as_char() == ':' && one.spacing() == Spacing::Joint && is_punct(two, ':'))
}

fn is_punct(token: &TokenTree, wanted: char) -> bool {
    matches!(token, TokenTree::Punct(punct) if punct.as_char() == wanted)
}

fn is_word(token: &TokenTree, wanted: &str) -> bool {
    matches!(token, TokenTree::Ident(ident) if ident == wanted)
}

/// What [`check`] says of made-up sources: as many problems as `wanted`, each containing its piece.
fn expect(sources: &[(&str, &str)], wanted: &[&str]) {
    let sources: Vec<Source> =
        sources.iter().map(|(path, text)| Source { path: (*path).into(), text: (*text).into() }).collect();
    let (problems, _) = check(&sources);
    let all_said = problems.iter().zip(wanted).all(|(problem, piece)| problem.contains(piece));
    assert!(problems.len() == wanted.len() && all_said, "wanted {wanted:#?}\nsaid {problems:#?}");
}

#[test]
fn an_import_against_the_table_is_caught_wherever_it_is_written() {
    let caught = &["src/x509/key.rs:2: layer: `x509` may import [spiffe], and this is `crate::issue"];
    for text in [
        "use std::fmt;\nuse crate::issue::Credential;",
        "use std::fmt;\nuse crate::{issue::{self, Credential}};",
        "use std::fmt;\nuse crate::{spiffe::SpiffeId, issue as other};",
        "fn f() {\n crate::issue::issue() }",
        "fn f() {\n format!(\"{}\", crate::issue::NAME) }",
        "fn f() {\n super::super::issue::issue() }",
        "mod inner {\n use super::super::super::issue::issue; }",
        "#[cfg(not(test))]\nuse crate::issue::Credential;",
        "#[cfg(test)] use crate::issue::Credential;\nuse crate::issue::Credential;",
        "struct S { #[cfg(test)] a: Map<u8, u8>,\n b: crate::issue::Credential }",
    ] {
        let said = if text.contains("{self,") { [caught[0]; 2].to_vec() } else { caught.to_vec() };
        expect(&[("src/x509/key.rs", text)], &said);
    }
}

#[test]
fn comments_strings_and_tests_are_not_code() {
    for text in [
        "// use crate::issue::Credential;",
        "//! [`crate::issue::Credential`]",
        "/// See crate::issue.\nstruct S;",
        "const S: &str = \"crate::issue::Credential\";",
        "const S: &str = r#\"use crate::issue;\"#;",
        "#[cfg(test)]\nmod tests { use crate::issue::Credential; }",
        "#[cfg(test)]\n#[allow(unused)]\nimpl S { fn f() -> Map<u8, u8> { crate::issue::f() } }",
        "#[cfg(test)]\nuse crate::{issue::Credential, hub};",
        "use crate::spiffe::SpiffeId;",
        "use super::csr::Csr;",
    ] {
        expect(&[("src/x509/key.rs", text)], &[]);
    }
    expect(&[("src/x509/tests.rs", "use crate::issue::Credential;")], &[]);
}

#[test]
fn the_longest_prefix_decides() {
    expect(&[("src/policy/template.rs", "use crate::attest::workload::Workload;")], &[]);
    let caught = "`policy` may import [x509, attest::workload, text], and this is `crate::attest::Peer`, of `attest`";
    expect(&[("src/policy/template.rs", "use crate::attest::Peer;")], &[caught]);
    expect(&[("src/policy/watch.rs", "use crate::policy::PolicySet;")], &[]);
    expect(&[("src/policy.rs", "use crate::policy::watch::PolicyFiles;")], &["of `policy::watch`"]);
    expect(&[("src/attest/workload.rs", "use super::peer::Peer;")], &["of `attest`"]);
}

#[test]
fn a_name_shown_by_a_parent_belongs_to_the_child() {
    for shown in ["pub use workload::{UnixFacts, Workload};", "pub use self::{peer::Peer, workload::Workload};"] {
        let parent = ("src/attest.rs", shown);
        expect(&[parent, ("src/policy.rs", "use crate::attest::Workload;")], &[]);
        expect(&[parent, ("src/policy.rs", "use crate::attest::{Workload, Peer};")], &["`crate::attest::Peer`"]);
    }
    let parent = ("src/policy.rs", "pub use self::watch::PolicyFiles;");
    expect(&[parent, ("src/policy/cel.rs", "use super::PolicyFiles;")], &["of `policy::watch`"]);
    expect(&[("src/policy.rs", "use self::watch::PolicyFiles;")], &["of `policy::watch`"]);
}

#[test]
fn an_outside_path_away_from_home_is_caught() {
    expect(&[("src/hub.rs", "use tonic::Status;")], &["src/hub.rs:1: home: `tonic` is for [proto, server, "]);
    expect(&[("src/server/refusal.rs", "use tonic::Status;")], &[]);
    expect(&[("src/issue.rs", "use std::{env, fs};")], &["`std::env` is for [config, cli, main]"]);
    expect(&[("src/issue.rs", "fn f() { std::env::var(\"HOME\") }")], &["`std::env`"]);
    expect(&[("src/issue.rs", "use opentelemetry_otlp::tonic::Wanted;")], &[]);
}

#[test]
fn a_module_without_a_row_and_an_empty_name_are_caught() {
    expect(&[("src/extra.rs", "")], &["src/extra.rs:1: layer: `extra` has no row"]);
    expect(&[("src/issue.rs", "use crate::extra::X;")], &["src/issue.rs:1: layer: `crate::extra::X` is in no row"]);
    expect(&[("src/server/mod.rs", "")], &["src/server/mod.rs:1: name:"]);
    expect(&[("src/issue.rs", "fn f( {")], &["src/issue.rs:1: syntax:"]);
}

#[test]
fn sizes_are_held_at_the_bound_and_one_past_it() {
    let file =
        |lines| "const A: u8 = 1;\n\n// no code\n/// Nor this.\n".repeat(lines) + "#[cfg(test)]\nmod tests {\n}\n";
    expect(&[("src/issue.rs", &file(MAX_FILE_LINES))], &[]);
    expect(&[("src/issue.rs", &file(MAX_FILE_LINES + 1))], &["src/issue.rs:1: size: 401 lines of code"]);
    let function = |lines| format!("\nfn long() {{\n{}}}", "f();\n\n// no code\n".repeat(lines - 2));
    expect(&[("src/issue.rs", &function(MAX_FUNCTION_LINES))], &[]);
    expect(&[("src/issue.rs", &function(MAX_FUNCTION_LINES + 1))], &["src/issue.rs:2: size: `long` has 71 lines"]);
}
