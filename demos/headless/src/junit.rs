//! The JUnit XML report, as test dashboards read it.

use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};
use quick_xml::events::{BytesDecl, BytesText, Event};
use quick_xml::writer::Writer;

/// One checked thing.
pub struct Test {
    /// Where it belongs, such as `lavapipe.one_token`.
    pub class: String,
    /// What was checked, such as `prefill f32`.
    pub name: String,
    /// Seconds that it took.
    pub seconds: f64,
    /// Numbers worth keeping, pass or fail.
    pub output: String,
    /// What went wrong, if something did.
    pub failure: Option<String>,
}

/// The tests of one device.
pub struct Suite {
    /// The device.
    pub name: String,
    /// Its tests.
    pub tests: Vec<Test>,
}

/// Writes the report of all devices.
///
/// # Errors
/// Whatever the file system reports.
pub fn write(path: &Path, suites: &[Suite]) -> Result<()> {
    let mut file = Vec::new();
    report(&mut file, suites)?;
    crate::case::replace(path, &file).with_context(|| format!("cannot write {}", path.display()))
}

fn report(to: impl Write, suites: &[Suite]) -> std::io::Result<()> {
    let mut xml = Writer::new_with_indent(to, b' ', 2);
    xml.write_event(Event::Decl(BytesDecl::new("1.0", Some("UTF-8"), None)))?;
    let all = || suites.iter().flat_map(|s| &s.tests);
    let root = xml.create_element("testsuites").with_attributes(counts(all()).iter().map(|(k, v)| (*k, v.as_str())));
    root.write_inner_content(|xml| {
        for suite in suites {
            let element = xml
                .create_element("testsuite")
                .with_attribute(("name", clean(&suite.name).as_str()))
                .with_attributes(counts(suite.tests.iter()).iter().map(|(k, v)| (*k, v.as_str())));
            element.write_inner_content(|xml| suite.tests.iter().try_for_each(|test| case(xml, test)))?;
        }
        Ok(())
    })?;
    Ok(())
}

fn case<W: Write>(xml: &mut Writer<W>, test: &Test) -> std::io::Result<()> {
    let element = xml
        .create_element("testcase")
        .with_attribute(("classname", clean(&test.class).as_str()))
        .with_attribute(("name", clean(&test.name).as_str()))
        .with_attribute(("time", format!("{:.6}", test.seconds).as_str()));
    element.write_inner_content(|xml| {
        if let Some(why) = &test.failure {
            let why = clean(why);
            let first = why.lines().next().unwrap_or_default();
            let element = xml.create_element("failure").with_attribute(("message", first));
            element.write_text_content(BytesText::new(&why))?;
        }
        xml.create_element("system-out").write_text_content(BytesText::new(&clean(&test.output)))?;
        Ok(())
    })?;
    Ok(())
}

fn counts<'a>(tests: impl Iterator<Item = &'a Test>) -> [(&'static str, String); 3] {
    let (mut n, mut failures, mut seconds) = (0, 0, 0.0);
    for test in tests {
        n += 1;
        failures += test.failure.is_some() as usize;
        seconds += test.seconds;
    }
    [("tests", n.to_string()), ("failures", failures.to_string()), ("time", format!("{seconds:.6}"))]
}

/// XML 1.0 has no way to write most control characters; driver messages may hold them.
fn clean(text: &str) -> String {
    text.chars()
        .map(|c| {
            if matches!(c, '\t' | '\n') || (c >= ' ' && !matches!(c, '\u{fffe}' | '\u{ffff}')) { c } else { '\u{fffd}' }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn awkward_text_survives() {
        let why = "a < b && \"c\"\u{1b}[31m\nsecond line ]]>";
        let test = Test {
            class: "cpu.<x>".into(),
            name: "o & ht".into(),
            seconds: 0.25,
            output: "o 1e-7".into(),
            failure: Some(why.into()),
        };
        let mut file = Vec::new();
        report(&mut file, &[Suite { name: "cpu \"fast\"".into(), tests: vec![test] }]).unwrap();
        let text = String::from_utf8(file).unwrap();

        let mut reader = quick_xml::Reader::from_str(&text);
        reader.config_mut().check_end_names = true;
        let (mut names, mut body) = (Vec::new(), String::new());
        loop {
            match reader.read_event().unwrap() {
                Event::Start(e) => {
                    for attribute in e.attributes() {
                        attribute.unwrap();
                    }
                    names.push(e.name().as_ref().to_string());
                }
                Event::Text(t) => body.push_str(&t),
                Event::GeneralRef(r) => body.push_str(&format!("&{};", &*r)),
                Event::Eof => break,
                _ => {}
            }
        }
        assert_eq!(names, ["testsuites", "testsuite", "testcase", "failure", "system-out"]);
        assert!(body.contains("a &lt; b &amp;&amp; ") && body.contains("second line ]]&gt;"), "{body}");
        assert!(text.contains("failures=\"1\"") && !text.contains('\u{1b}'), "{text}");
    }
}
