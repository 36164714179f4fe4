//! What the scheduler needs of a model: slots that each hold a sequence, read in pieces and written token by token.

pub mod local;

use gatedelta::Result;

/// A model with room for several sequences. After an error a slot is good again once something [begins](Engine::begin) there.
pub trait Engine {
    /// How many sequences there can be.
    fn slots(&self) -> usize;

    /// Makes one of the `free` slots hold a beginning of `ids`, the longest that is known and leaves a token to read. Gives the
    /// slot and how many tokens it holds.
    ///
    /// # Errors
    /// What the device reports.
    fn begin(&mut self, free: &[usize], ids: &[u32]) -> Result<(usize, usize)>;

    /// Reads the next piece of `prompt`, of which the slot holds `done` tokens: a part that takes not much longer than writing
    /// a token does. Gives how many it holds then, and the logits `[vocab]` of the last.
    ///
    /// # Errors
    /// What the device reports.
    fn read(&mut self, slot: usize, prompt: &[u32], done: usize) -> Result<(usize, Vec<f32>)>;

    /// Appends one token to each of several slots; the logits `[vocab]` of each, in the same order.
    fn step(&mut self, tokens: &[(usize, u32)]) -> Vec<Result<Vec<f32>>>;

    /// An answer has come to its end there; its last token may not have been read.
    fn end(&mut self, slot: usize);
}
