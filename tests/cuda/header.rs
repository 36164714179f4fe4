//! `cuda/rows.cuh`: the kernel table as C++ structs. The file is part of the repository, and the test says how to renew it.

use std::fmt::Write;
use std::path::Path;

use gatedelta::kernel::{self, Access, Field, Scalar};

/// The text of the header.
pub fn text() -> String {
    let mut out = String::from(
        "// The kernel table of src/kernel as structs: memory, numbers that choose a variant, numbers of the launch, in the order in\n\
         // which the host writes them. Written by the test cuda::header with GATEDELTA_WRITE=1.\n\
         #pragma once\n\
         #include <stdint.h>\n",
    );
    for row in kernel::ALL {
        writeln!(out, "\nnamespace row::{} {{", row.name).unwrap();
        out += "struct Memory {\n";
        for arg in row.args {
            let constant = if arg.access == Access::Read { "const " } else { "" };
            writeln!(out, "    {constant}void* {};", arg.name).unwrap();
        }
        out += "};\n";
        fields(&mut out, "Consts", row.consts);
        fields(&mut out, "Params", row.params);
        let n = row.args.len();
        write!(
            out,
            "struct Launch {{\n    Memory m;\n    uint64_t bytes[{n}];\n    uint32_t base[3];\n    Consts c;\n    Params p;\n}};\n}}\n"
        )
        .unwrap();
    }
    out
}

fn fields(out: &mut String, name: &str, fields: &[Field]) {
    writeln!(out, "struct {name} {{").unwrap();
    for field in fields {
        let ty = if field.ty == Scalar::U32 { "uint32_t" } else { "float" };
        writeln!(out, "    {ty} {};", field.name).unwrap();
    }
    *out += "};\n";
}

#[test]
fn the_header_says_what_the_table_says() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda/rows.cuh");
    let wanted = text();
    if std::env::var_os("GATEDELTA_WRITE").is_some() {
        std::fs::write(&path, &wanted).unwrap();
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        found == wanted,
        "cuda/rows.cuh is not what src/kernel says: GATEDELTA_WRITE=1 cargo test cuda::header renews it"
    );
}
