"""Writes to registers that an asynchronous product still reads, found in machine code written for these tests."""

import pytest

from tests.support.wgmma_hazards import hazards

PRODUCT = "HGMMA.64x16x16.F32.BF16 R24, R32, gdesc[UR20], R24, gsb0 "


def code(*lines):
    """As nvdisasm prints: labels end with a colon, and an address stands before each instruction."""
    return "\n".join(
        line if line.endswith(":") else f"        /*{16 * n:04x}*/                   {line} ;"
        for n, line in enumerate(lines)
    )


def wait(groups):
    return f"WARPGROUP.DEPBAR.LE gsb0, {groups:#x} "


@pytest.mark.parametrize("write", [
    "IMAD R35, R2, R3, R4", "LDSM.16.M88.4 R30, [R2+UR14]", "LDG.E.128 R32, desc[UR18][R2.64]", "CS2R R34, SRZ",
    "LOP3.LUT P0, R33, R2, 0xf, RZ, 0xc0, !PT", "ATOMG.E.ADD.STRONG.GPU PT, R32, desc[UR18][R2.64], R5",
    "HGMMA.64x32x16.F32.BF16 R20, R40, gdesc[UR20], R20, gsb0", "@P2 IMAD.WIDE.U32 R31, R2, R3, R4",
])  # fmt: skip
def test_a_write_before_the_wait_is_reported(write):
    report = hazards(code(PRODUCT, write, wait(0), "EXIT"))
    assert report.products == 1 + write.startswith("HGMMA")
    assert len(report.writes) >= 1
    assert write.removeprefix("@P2 ") in report.writes[0]


@pytest.mark.parametrize("lines", [
    (PRODUCT, wait(0), "IMAD R35, R2, R3, R4"),
    (PRODUCT, "IMAD R36, R2, R3, R4"),  # the register after the last one
    (PRODUCT, "STS.128 [R32], R32", "STG.E desc[UR18][R32.64], R33", "BAR.SYNC R32, R33"),  # reads
    (PRODUCT, "ISETP.GE.AND P0, PT, R32, R33, PT", "R2UR UR4, R32"),
    ("HGMMA.64x16x16.F32.BF16 R24, gdesc[UR20], R24, gsb0", "IMAD R32, R2, R3, R4"),  # both operands in shared memory
])  # fmt: skip
def test_other_instructions_are_not(lines):
    assert hazards(code(*lines, "EXIT")).writes == []


def test_a_wait_leaves_the_newest_groups_in_flight():
    second = PRODUCT.replace("R32", "R40")
    assert hazards(code(PRODUCT, second, wait(1), "IMAD R32, R2, R3, R4", "EXIT")).writes == []
    assert len(hazards(code(PRODUCT, second, wait(1), "IMAD R40, R2, R3, R4", "EXIT")).writes) == 1
    open_group = PRODUCT.replace(", gsb0", "")  # closed by the next product
    assert len(hazards(code(open_group, second, wait(1), "IMAD R32, R2, R3, R4", "EXIT")).writes) == 1
    assert hazards(code(open_group, second, wait(0), "IMAD R32, R2, R3, R4", "EXIT")).writes == []
    assert len(hazards(code(open_group, wait(0), "IMAD R32, R2, R3, R4", "EXIT")).writes) == 1


def test_loops_and_branches_are_followed():
    loop = [".L_x_0:", "IMAD R32, R2, R3, R4", PRODUCT, "@P0 BRA `(.L_x_0) ", "EXIT"]
    assert len(hazards(code(*loop)).writes) == 1
    assert hazards(code(*loop[:3], wait(0), *loop[3:])).writes == []
    past = ["@P1 BRA `(.L_x_0) ", PRODUCT, "EXIT", ".L_x_0:", "IMAD R32, R2, R3, R4", "EXIT"]
    assert hazards(code(*past)).writes == []
    past[2] = "@P0 EXIT"
    assert len(hazards(code(*past)).writes) == 1
