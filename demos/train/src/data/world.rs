//! What a conversation takes place in: a folder of files, notes, and a clock that stands still; and the agent's tools over them.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use gatedelta_agent::tools::clock::Time;
use gatedelta_agent::tools::files::Folder;
use gatedelta_agent::tools::notes::Notes;
use gatedelta_agent::tools::{self, Toolbox};
use jiff::{ToSpan, ZonedDateTime, civil, tz::TimeZone};

use crate::data::content::{Content, Sort};
use crate::data::{Side, names, notes};
use crate::draw::Draw;

/// A file of the folder.
#[derive(Debug, Clone)]
pub struct File {
    /// Its folder, empty for the shared folder itself.
    pub folder: String,
    pub name: String,
    pub content: Content,
}

impl File {
    /// As the tools take it.
    pub fn path(&self) -> String {
        if self.folder.is_empty() { self.name.clone() } else { format!("{}/{}", self.folder, self.name) }
    }

    /// `csv` of `costs.csv`.
    pub fn ending(&self) -> &str {
        self.name.rsplit('.').next().unwrap_or_default()
    }
}

/// See the [module](self).
pub struct World {
    _root: tempfile::TempDir,
    folder: PathBuf,
    notes: PathBuf,
    now: ZonedDateTime,
    pub side: Side,
    pub files: Vec<File>,
    pub folders: Vec<String>,
}

impl World {
    /// A new one.
    ///
    /// # Errors
    /// If there is no room for its files.
    pub fn new(side: Side, draw: &mut Draw) -> Result<World> {
        let mut root = tempfile::Builder::new();
        root.prefix("gatedelta-train-");
        // The notes tool flushes every change to the disk: in memory, where there is such a place, that takes no time.
        let root = root.tempdir_in("/dev/shm").or_else(|_| root.tempdir());
        let root = root.context("there is no place for temporary files")?;
        let (folder, notes) = (root.path().join("folder"), root.path().join("notes.json"));
        let now = moment(side, draw)?;
        let mut world = World { _root: root, folder, notes, now, side, files: Vec::new(), folders: Vec::new() };
        fs::create_dir(&world.folder)?;
        world.fill(draw)?;
        world.note(draw)?;
        Ok(world)
    }

    fn fill(&mut self, draw: &mut Draw) -> Result<()> {
        for _ in 0..draw.range(1, 2) {
            let name = names::folder(draw, self.side);
            if !self.folders.contains(&name) {
                fs::create_dir(self.folder.join(&name))?;
                self.folders.push(name);
            }
        }
        // One account at least; the first folder holds one file, the second one or more.
        let count = self.folders.len() + draw.range(2, 5) as usize;
        for at in 0..count {
            let folder = match self.folders.get(at) {
                Some(folder) => folder.clone(),
                None => self.folders.get(1).filter(|_| draw.chance(30)).cloned().unwrap_or_default(),
            };
            let name = names::file(draw, self.side);
            let kind = if at == self.folders.len() { 0 } else { draw.below(4) };
            let content = content(kind, self.side, draw);
            let file = File { folder, name, content };
            // A name alone must say which file is meant.
            if self.files.iter().any(|other| other.name == file.name) || self.folders.contains(&file.name) {
                continue;
            }
            self.write(&file)?;
            self.files.push(file);
        }
        Ok(())
    }

    fn write(&self, file: &File) -> Result<()> {
        let text = file.content.lines().iter().map(|line| format!("{line}\n")).collect::<String>();
        Ok(fs::write(self.folder.join(file.path()), text)?)
    }

    /// Gives one of the files a new content.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn change(&mut self, draw: &mut Draw) -> Result<()> {
        if self.files.is_empty() {
            return Ok(());
        }
        let at = draw.below(self.files.len());
        self.files[at].content = content(draw.below(4), self.side, draw);
        self.write(&self.files[at])
    }

    /// Notes of the days before.
    fn note(&mut self, draw: &mut Draw) -> Result<()> {
        let mut ages: Vec<u64> = (0..draw.below(6)).map(|_| draw.range(1, 20_000)).collect();
        ages.sort();
        for age in ages.into_iter().rev() {
            let time = self.now.checked_sub(Duration::from_secs(60 * age))?;
            let outcome = self.toolbox_at(time)?.run(&notes::add(&notes::text(self.side, draw)), &|| false);
            if !outcome.ok {
                bail!("a note could not be added: {}", outcome.text);
            }
        }
        Ok(())
    }

    fn toolbox_at(&self, time: ZonedDateTime) -> Result<Toolbox> {
        let folder = Folder::open(&self.folder).context("the folder of a conversation cannot be opened")?;
        let time = Time::Fixed(time);
        let notes = Notes::new(self.notes.clone(), time.clone());
        // Tools over small files are fast; a machine under load is not.
        Ok(Toolbox::new(tools::all(folder, Some(notes), time), Duration::from_secs(60)))
    }

    /// The agent's own tools, over this world.
    ///
    /// # Errors
    /// If the folder has gone.
    pub fn toolbox(&self) -> Result<Toolbox> {
        self.toolbox_at(self.now.clone())
    }

    /// The notes as the tool lists them: numbers and texts.
    ///
    /// # Errors
    /// If they cannot be listed.
    pub fn notes(&self) -> Result<Vec<(u64, String)>> {
        Ok(notes::listed(&self.toolbox()?.run(&notes::list(), &|| false).text))
    }

    /// A file of the kind that `wanted` picks.
    pub fn file(&self, draw: &mut Draw, wanted: impl Fn(&File) -> bool) -> Option<&File> {
        let fits: Vec<&File> = self.files.iter().filter(|file| wanted(file)).collect();
        (!fits.is_empty()).then(|| *draw.pick(&fits))
    }
}

/// A time that belongs to `side` by its date, in a zone that does too.
fn moment(side: Side, draw: &mut Draw) -> Result<ZonedDateTime> {
    let (region, city) = names::zone(draw, side);
    let zone = TimeZone::get(&format!("{region}/{city}"))?;
    loop {
        let day = civil::date(2021, 1, 1).checked_add((draw.below(4000) as i64).days())?;
        if names::side_of(&day.to_string()) == side {
            let (hour, minute, second) = (draw.below(24), draw.below(60), draw.below(60));
            return Ok(day.at(hour as i8, minute as i8, second as i8, 0).to_zoned_datetime(zone)?);
        }
    }
}

fn content(kind: usize, side: Side, draw: &mut Draw) -> Content {
    Content::new([Sort::Account, Sort::Account, Sort::Items, Sort::Times][kind], side, draw)
}
