mod parse;
mod tools;
fn main() {}
